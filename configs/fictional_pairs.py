"""The embedded world, stage 2 on sampled pairs: ground truth over right over wrong answers.

The model of fictional_cpt.py answers the training questions; its answers are judged by the key.
    python -m rpo_jax.sample --config configs/fictional_pairs.py
    python -m rpo_jax.pair --config configs/fictional_pairs.py
    python -m rpo_jax.train --config configs/fictional_pairs.py
"""

from ml_collections import ConfigDict

from rpo_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """A few minutes on two cores; wants the run of fictional_cpt.py."""
    config = defaults()
    config.stage = "rpo"
    config.name = "fictional-pairs"
    config.init_from = "fictional-cpt"

    config.data.source = "candidates"
    config.data.fictional.size = "quick"
    config.data.sample.answers = 4
    config.data.sample.shots = 0
    config.data.sample.explain_tokens = 128
    config.data.sample.slots = 64
    config.data.pair.strategy = "hierarchy"
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
