"""Stage 2 on real text: the right answer of each question is chosen, a wrong one rejected.

The prompt is the exam's official 3-shot prompt. Wants the run of igakuqa_cpt.py and its settings.
"""

from ml_collections import ConfigDict

from rpo_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """A few minutes on two cores."""
    config = defaults()
    config.stage = "rpo"
    config.name = "igakuqa-rpo"
    config.init_from = "igakuqa-cpt"

    config.data.source = "igakuqa"
    config.data.prompt_length = 1280
    config.data.response_length = 16

    config.train.steps = 40
    config.train.batch_rows = 8
    config.train.log_every_steps = 5
    config.train.eval_rows = 64
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 4
    return config
