"""The embedded world, stage 2: RPO on ground-truth explanations against wrong ones."""

from ml_collections import ConfigDict

from rpo_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """About a minute on two cores; wants the run of fictional_cpt.py."""
    config = defaults()
    config.stage = "rpo"
    config.name = "fictional-rpo"
    config.init_from = "fictional-cpt"

    config.data.source = "fictional"
    config.data.fictional.size = "quick"
    config.data.prompt_length = 160
    config.data.response_length = 160

    # beta and alpha as arXiv:2404.19733v3 found best; its learning rate, 7e-7, was for a 70B model.
    config.rpo.beta = 0.1
    config.rpo.alpha = 1.0

    config.train.steps = 80
    config.train.batch_rows = 8
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 8
    return config
