"""The embedded world, stage 0: a base model from random weights, on general text.

It learns the language and both answer formats, and nothing about the medicine of the exam.
"""

from ml_collections import ConfigDict

from rpo_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """About a minute and a half on two cores."""
    config = defaults()
    config.stage = "cpt"
    config.name = "fictional-base"
    config.model.shape = "laptop-1m"
    config.tokenizer.train_vocab_size = 1024

    config.data.source = "fictional"
    config.data.fictional.size = "quick"
    config.data.fictional.text = "general"
    config.data.row_length = 256

    config.train.steps = 120
    config.train.batch_rows = 16
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 20
    config.optim.weight_decay = 0.1
    return config
