"""The embedded world, stage 1: continued pretraining on the textbook.

General passages are replayed beside it: without them the model forgets how answers are written.
"""

from ml_collections import ConfigDict

from rpo_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """About two minutes on two cores; wants the run of fictional_base.py."""
    config = defaults()
    config.stage = "cpt"
    config.name = "fictional-cpt"
    config.init_from = "fictional-base"

    config.data.source = "fictional"
    config.data.fictional.size = "quick"
    config.data.fictional.text = "both"
    config.data.row_length = 256

    config.train.steps = 150
    config.train.batch_rows = 16
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 20
    config.optim.weight_decay = 0.1
    return config
