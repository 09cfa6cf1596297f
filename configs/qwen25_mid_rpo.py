"""Between laptop and pod: RPO of the 0.5B, 1.5B and 7B; the size is the argument.

Starts from the run of qwen25_mid_cpt.py, on the same slices and GPUs. A row is one pair: prompt,
chosen and rejected in slots of 1536, 256 and 256 tokens.
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
    """A few hundred steps over a few thousand pairs."""
    config = defaults()
    config.stage = "rpo"
    config.name = "qwen25-mid-rpo" + ("" if arg == "0.5b" else f"-{arg}")
    config.init_from = config.name.replace("rpo", "cpt")
    size, _, gpu = arg.partition("-")
    config.model.shape = f"qwen2.5-{size}"
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "dense" if gpu else "splash"
    config.model.remat = "full"
    config.mesh.data = 1
    _, config.mesh.fsdp, config.train.batch_rows, config.train.micro_batches = choose(SIZES, arg)

    config.data.train = ("pairs/train.jsonl",)
    config.data.heldout = ("pairs/heldout.jsonl",)
    config.data.prompt_length = 1536
    config.data.response_length = 256

    config.train.steps = 300
    config.optim.learning_rate = 7e-7
    config.optim.warmup_steps = 30
    return config
