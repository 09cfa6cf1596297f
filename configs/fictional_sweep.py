"""The weights of the loss on the embedded world: alpha x beta, three seeds each, as adapters.

python -m rpo_jax.sweep --config configs/fictional_sweep.py --together
python -m rpo_jax.sweep --config configs/fictional_sweep.py:small --together  # some of its points
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from rpo_jax.config import choose, defaults

GRIDS = {  # alpha, beta
    "full": ((0.0, 0.25, 1.0, 2.0), (0.05, 0.1, 0.5, 1.0)),
    "small": ((0.0, 0.25, 1.0), (0.1, 1.0)),
}


def get_config(arg: str = "full") -> ConfigDict:
    """What all points share; wants the run of fictional_cpt.py."""
    config = defaults()
    config.stage = "rpo"
    config.name = "fictional-sweep"
    config.init_from = "fictional-cpt"

    config.data.source = "fictional"
    config.data.fictional.size = "quick"
    config.data.prompt_length = 160
    config.data.response_length = 160

    config.lora.rank = 16
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 8

    config.train.steps = 80
    config.train.batch_rows = 8
    config.train.micro_batches = 4  # 18 points together: 3.6 GiB on a CPU; 11.2 with 1, and slower
    return config


def sweep(arg: str = "full") -> Iterator[dict[str, Any]]:
    """48 points, or 18 of them: alpha = 0 is DPO."""
    alphas, betas = choose(GRIDS, arg)
    for alpha in alphas:
        for beta in betas:
            for seed in range(3):
                yield {"rpo.alpha": alpha, "rpo.beta": beta, "seed": seed}
