"""AdamW and the learning-rate schedule."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Int

from rpo_jax.config import Optim


def make_optimizer(config: Optim) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay; the step scales the result by the learning rate.

    Source: arXiv:1711.05101.
    """
    chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    chain.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=is_decayed))
    return optax.chain(*chain)


def is_decayed(params: Any) -> Any:
    """True for matrices, False for norms and biases, whose pull to zero would mean nothing."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "table"), params
    )


def learning_rate_fraction(config: Optim, steps: int, step: Int[Array, ""]) -> Array:
    """Share of the peak learning rate in the step after `step` steps; 1 when the warm-up ends."""
    warmup = config.warmup_steps
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(1.0, max(steps - warmup - 1, 1), config.final_fraction)
    else:
        rest = optax.constant_schedule(1.0)
    ramp = optax.linear_schedule(1 / (warmup + 1), 1.0, warmup)
    return optax.join_schedules([ramp, rest], [warmup])(step)
