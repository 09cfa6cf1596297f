"""Between laptop and pod: continued pretraining of the 0.5B, 1.5B and 7B; the size is the argument.

`--config=configs/qwen25_mid_cpt.py:0.5b` is meant for the one v5e chip of a free Colab, `1.5b` and
`7b` for one host of eight v6e chips, those with a card's name for GPUs of one host; `rpo_jax.plan`
tells whether they fit. Wants the converted model, your own text, and the exam whose questions are
kept out of it: IGAKUQA_DIR or data.igakuqa.directory, a copy of the data folder of
github.com/jungokasai/IgakuQA (or data.corpus.decontaminate=False).
"""

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# Size -> what it is meant for, and for that: fsdp, rows a step, micro-batches.
SIZES = {
    "0.5b": ("v5e:1x1", 1, 16, 8),
    "1.5b": ("v6e:2x4", 8, 32, 1),
    "7b": ("v6e:2x4", 8, 16, 2),
    "0.5b-l4": ("l4:1", 1, 16, 16),
    "1.5b-h100": ("h100:1", 1, 16, 8),
    "7b-h100": ("h100:8", 8, 16, 2),
}


def get_config(arg: str = "0.5b") -> ConfigDict:
    """1000 steps of rows of 2048 tokens."""
    config = defaults()
    config.stage = "cpt"
    config.name = "qwen25-mid-cpt" + ("" if arg == "0.5b" else f"-{arg}")
    size, _, gpu = arg.partition("-")
    config.init_from = f"models/qwen2.5-{size}"
    config.model.shape = f"qwen2.5-{size}"
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "dense" if gpu else "splash"
    config.model.remat = "full"
    config.mesh.data = 1
    _, config.mesh.fsdp, config.train.batch_rows, config.train.micro_batches = choose(SIZES, arg)

    config.data.train = ("corpus/train/*.jsonl.gz",)
    config.data.heldout = ("corpus/heldout/*.jsonl.gz",)
    config.data.corpus.exams = ("igakuqa",)  # whose questions are kept out of the text
    config.data.row_length = 2048

    config.train.steps = 1000
    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 0.1
    return config
