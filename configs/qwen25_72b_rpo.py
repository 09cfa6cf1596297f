"""Stage 2 of the 72B: RPO of all weights on a TPU slice, the slice being the argument.

`--config=configs/qwen25_72b_rpo.py:v6e:16x16`; see qwen25_72b_cpt.py, whose run it starts from.
A row is one pair: prompt, chosen and rejected in slots of 3072, 512 and 512 tokens. Loss weights
and learning rate are those of arXiv:2404.19733v3, since arXiv:2504.18080 does not tell its own.
"""

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# Slice -> (data, fsdp, seq, tensor), pairs a step, remat.
SLICES = {
    "v5p:4x4x4": ((1, 16, 1, 4), 16, "dots"),
    "v5e:16x16": ((1, 64, 1, 4), 64, "mlp"),
    "v6e:8x8": ((1, 16, 1, 4), 16, "mlp"),
    "v6e:16x16": ((1, 64, 1, 4), 64, "dots"),
    "tpu7x:4x4x4": ((1, 32, 2, 2), 32, "dots"),
}


def get_config(arg: str = "v5p:4x4x4") -> ConfigDict:
    """A few hundred steps over a few thousand pairs."""
    config = defaults()
    config.stage = "rpo"
    config.name = "qwen25-72b-rpo"
    config.init_from = "qwen25-72b-cpt"
    config.model.shape = "qwen2.5-72b"
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "splash"
    mesh, rows, config.model.remat = choose(SLICES, arg)
    config.mesh.data, config.mesh.fsdp, config.mesh.seq, config.mesh.tensor = mesh

    config.data.train = ("pairs/train.jsonl",)
    config.data.heldout = ("pairs/heldout.jsonl",)
    config.data.prompt_length = 3072
    config.data.response_length = 512

    config.train.steps = 300
    config.train.batch_rows = rows
    config.train.eval_rows = 4 * rows
    config.optim.learning_rate = 7e-7
    config.optim.warmup_steps = 30
    config.checkpoint.save_every_steps = 50
    return config
