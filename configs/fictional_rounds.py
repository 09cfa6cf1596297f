"""The embedded world, stage 2 in rounds: `python -m rpo_jax.iterate --config` this file.

Each round samples from the model of the round before, which is also the reference; it has half the
steps of fictional_pairs.py. Later rounds draw with a higher temperature, as in arXiv:2404.19733v3:
a model that was trained to agree with itself would draw few different answers.
"""

from ml_collections import ConfigDict

from rpo_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """About ten minutes on two cores; wants the run of fictional_cpt.py."""
    config = defaults()
    config.stage = "rpo"
    config.name = "fictional-rounds"
    config.init_from = "fictional-cpt"
    config.rounds.count = 2
    config.rounds.temperatures = (0.8, 1.0)

    config.data.source = "candidates"
    config.data.fictional.size = "quick"
    config.data.sample.answers = 4
    config.data.sample.shots = 0
    config.data.sample.explain_tokens = 128
    config.data.sample.slots = 64
    config.data.pair.strategy = "hierarchy"
    config.data.prompt_length = 160
    config.data.response_length = 160

    config.train.steps = 40
    config.train.batch_rows = 8
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 4
    return config
