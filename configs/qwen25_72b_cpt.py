"""Stage 1 of the 72B: continued pretraining of all weights on a TPU slice.

The slice is the argument: `--config=configs/qwen25_72b_cpt.py:v6e:8x8`. `rpo_jax.plan` has the
TPU compiler say what each takes. Wants the converted model and
your own text.
"""

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# Slice -> data, fsdp, tensor, rows of 4096 tokens a step, remat.
SLICES = {
    "v5p:4x4x4": (1, 16, 4, 16, "dots"),
    "v5e:16x16": (1, 64, 4, 64, "full"),
    "v6e:8x8": (1, 16, 4, 16, "full"),
    "2*v6e:16x16": (2, 64, 4, 128, "full"),
    "tpu7x:4x4x4": (1, 32, 4, 32, "full"),
}


def get_config(arg: str = "v5p:4x4x4") -> ConfigDict:
    """One pass over about 0.1 to 0.5 billion tokens, by the size of the slice."""
    config = defaults()
    config.stage = "cpt"
    config.name = "qwen25-72b-cpt"
    config.init_from = "models/qwen2.5-72b"
    config.model.shape = "qwen2.5-72b"
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "splash"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, rows, config.model.remat = choose(
        SLICES, arg
    )

    config.data.train = ("corpus/train/*.jsonl.gz",)
    config.data.heldout = ("corpus/heldout/*.jsonl.gz",)
    config.data.row_length = 4096

    config.train.steps = 1000
    config.train.batch_rows = rows
    config.train.eval_rows = 4 * rows
    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 0.1
    config.checkpoint.save_every_steps = 100
    return config
