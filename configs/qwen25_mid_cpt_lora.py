"""Continued pretraining by adapters of rank 64 on one chip, a free Colab's v5e or a GPU.

`--config=configs/qwen25_mid_cpt_lora.py:7b` is QLoRA over nf4; 1.5b is over bfloat16, and 0.5b has
room for all its weights (qwen25_mid_cpt.py). Rows and steps are those of qwen25_mid_cpt.py. The run
is what qwen25_mid_rpo_lora.py may start from: `--config.init_from=qwen25-mid-cpt-lora`. Wants what
qwen25_mid_cpt.py wants, the exam too.
"""

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# Size -> what it was compiled for, and for that: micro-batches of 16 rows, the frozen kernels.
SIZES = {
    "1.5b": ("v5e:1x1", 16, ""),
    "7b": ("v5e:1x1", 16, "nf4"),
    "7b-l4": ("l4:1", 16, "nf4"),
}


def get_config(arg: str = "7b") -> ConfigDict:
    """1000 steps of rows of 2048 tokens."""
    config = defaults()
    config.stage = "cpt"
    config.name = "qwen25-mid-cpt-lora" + ("" if arg == "7b" else f"-{arg}")
    size, _, gpu = arg.partition("-")
    config.init_from = f"models/qwen2.5-{size}"
    config.model.shape = f"qwen2.5-{size}"
    config.model.param_dtype = "bfloat16"
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "dense" if gpu else "splash"
    config.model.remat = "full"
    config.lora.rank = 64
    config.lora.alpha = 64.0
    _, config.train.micro_batches, config.lora.quantize = choose(SIZES, arg)
    config.train.batch_rows = 16

    config.data.train = ("corpus/train/*.jsonl.gz",)
    config.data.heldout = ("corpus/heldout/*.jsonl.gz",)
    config.data.corpus.exams = ("igakuqa",)  # whose questions are kept out of the text
    config.data.row_length = 2048

    config.train.steps = 1000
    config.optim.warmup_steps = 50
    return config
