"""Stage 1 on real text: the exam years 2018 to 2021 as documents, 2022 held out.

A network far too small to learn medicine, with the real tokenizer on the real exam: it shows that
the pipeline works on what the 72B will read. Wants IGAKUQA_DIR (a copy of the data folder of
github.com/jungokasai/IgakuQA) and QWEN_TOKENIZER (the tokenizer.json of any Qwen2.5 model).
"""

import os

from ml_collections import ConfigDict

from rpo_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    """A few minutes on two cores."""
    config = defaults()
    config.stage = "cpt"
    config.name = "igakuqa-cpt"
    config.model.shape = "laptop-qwen-vocab"
    config.tokenizer.path = os.environ.get("QWEN_TOKENIZER") or "$QWEN_TOKENIZER"

    config.data.source = "igakuqa"
    config.data.row_length = 256

    config.train.steps = 60
    config.train.batch_rows = 8
    config.train.log_every_steps = 5
    config.train.eval_rows = 64
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 6
    config.optim.weight_decay = 0.1
    return config
