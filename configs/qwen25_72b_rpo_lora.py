"""Stage 2 of the 72B with adapters of rank 16: over a bfloat16 base, or over nf4 (QLoRA).

The slice is the argument, and with it the base: `--config=configs/qwen25_72b_rpo_lora.py:v6e:2x2`
is QLoRA on four chips. Rows are those of qwen25_72b_rpo.py; it starts from qwen25_72b_cpt.py's run.
"""

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# Slice -> fsdp, tensor, pairs a step, micro-batches, remat, form of the frozen kernels.
SLICES = {
    "v6e:2x2": (4, 1, 16, 4, "full", "nf4"),
    "v5e:2x4": (2, 4, 16, 8, "full", "nf4"),
    "v6e:2x4": (4, 2, 16, 4, "full", ""),
    "v6e:4x8": (16, 2, 16, 1, "mlp", ""),
}


def get_config(arg: str = "v6e:2x2") -> ConfigDict:
    """A few hundred steps over a few thousand pairs."""
    config = defaults()
    config.stage = "rpo"
    config.name = "qwen25-72b-rpo-lora"
    config.init_from = "qwen25-72b-cpt"
    config.model.shape = "qwen2.5-72b"
    config.model.param_dtype = "bfloat16"
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "splash"
    config.lora.rank = 16
    fsdp, tensor, rows, micro_batches, config.model.remat, config.lora.quantize = choose(
        SLICES, arg
    )
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, fsdp, tensor

    config.data.train = ("pairs/train.jsonl",)
    config.data.heldout = ("pairs/heldout.jsonl",)
    config.data.prompt_length = 3072
    config.data.response_length = 512

    config.train.steps = 300
    config.train.batch_rows = rows
    config.train.micro_batches = micro_batches
    config.train.eval_rows = 64
    config.optim.warmup_steps = 30
    config.checkpoint.save_every_steps = 50
    return config
