"""AdamW and the learning-rate schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rpo_jax.config import Optim


def make_optimizer(config: Optim) -> optax.GradientTransformation:
    """Adam, decoupled weight decay; the step clips before and scales by the learning rate after.

    The moments are float32, as the gradients are, whatever the weights are.

    Source: arXiv:1711.05101.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)

    def init(params: optax.Params) -> optax.OptState:
        return adam.init(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))

    chain = [optax.GradientTransformation(init, adam.update)]
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=is_decayed))
    return optax.chain(*chain)


def clip_factor(config: Optim, grad_norm: Float[Array, ""]) -> Array | float:
    """What gradients of a global norm are multiplied by, so that it is `clip_norm` at most.

    One factor, and the norm that is measured anyway: optax's own clipping divides each element, for
    which XLA on CPU makes a copy of all gradients.
    """
    return jnp.minimum(1.0, config.clip_norm / grad_norm) if config.clip_norm else 1.0


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
