"""RPO with adapters of rank 16 on one chip, a free Colab's v5e or a GPU; the size is the argument.

`--config=configs/qwen25_mid_rpo_lora.py:7b` is QLoRA over nf4; 0.5b and 1.5b are over bfloat16.
Rows are those of qwen25_mid_rpo.py. Starts from the released model, converted, unless
`--config.init_from=qwen25-mid-cpt-lora` names the run of qwen25_mid_cpt_lora.py, or another one.
"""

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

# Size -> what it was compiled for, and for that: micro-batches of 16 pairs, the frozen kernels.
SIZES = {
    "0.5b": ("v5e:1x1", 8, ""),
    "1.5b": ("v5e:1x1", 16, ""),
    "7b": ("v5e:1x1", 8, "nf4"),
    "7b-l4": ("l4:1", 16, "nf4"),
}


def get_config(arg: str = "7b") -> ConfigDict:
    """A few hundred steps over a few thousand pairs."""
    config = defaults()
    config.stage = "rpo"
    config.name = "qwen25-mid-rpo-lora" + ("" if arg == "7b" else f"-{arg}")
    size, _, gpu = arg.partition("-")
    config.init_from = f"models/qwen2.5-{size}"
    config.model.shape = f"qwen2.5-{size}"
    config.model.param_dtype = "bfloat16"
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "dense" if gpu else "splash"
    config.model.remat = "full"
    config.lora.rank = 16
    _, config.train.micro_batches, config.lora.quantize = choose(SIZES, arg)
    config.train.batch_rows = 16

    config.data.train = ("pairs/train.jsonl",)
    config.data.heldout = ("pairs/heldout.jsonl",)
    config.data.prompt_length = 1536
    config.data.response_length = 256

    config.train.steps = 300
    config.optim.warmup_steps = 30
    return config
