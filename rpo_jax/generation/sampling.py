"""The choice of the next token, a row on its own: the same whatever the other rows are."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

# Rows of the vocabulary (Qwen2.5's is a multiple): a choice takes a block, then a row of it.
_BLOCK = 128


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["seed_B", "temperature_B", "top_k_B", "top_p_B"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Draw:
    """The numbers of `Settings` that shape a draw, one a row."""

    seed_B: Any
    temperature_B: Any
    top_k_B: Any
    top_p_B: Any


def choose(
    logits_VB: Float[Array, "V B"], draw: Draw, index_B: Int[Array, " B"], live_B: Bool[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each row and its log-probability (nats, temperature 1, nothing cut).

    Args:
        logits_VB: float32; -inf for what is no token.
        draw: settings and seed of each row.
        index_B: which token of the completion this is; seed and index fix the randomness.
        live_B: rows whose result matters. What no live row asks for is not computed.
    """
    logz_B = jax.nn.logsumexp(logits_VB, axis=0)
    random_B = draw.temperature_B > 0

    def take_best() -> Array:
        return _take_best(logits_VB)

    def sample() -> Array:
        scaled_BV = logits_VB.T / jnp.where(random_B, draw.temperature_B, 1.0)[:, None]
        cut_B = (draw.top_k_B > 0) | (draw.top_p_B < 1)
        scaled_BV = jax.lax.cond(
            jnp.any(cut_B & random_B & live_B), _cut, lambda x, _: x, scaled_BV, draw
        )
        drawn_B = jax.vmap(_sample)(scaled_BV, draw.seed_B, index_B)
        return jnp.where(random_B, drawn_B, take_best())

    token_B = jax.lax.cond(jnp.any(random_B & live_B), sample, take_best)
    logit_B = jnp.take_along_axis(logits_VB, token_B[None], axis=0)[0]
    return token_B, logit_B - logz_B


def _blocks(logits_V: Array) -> Array:
    """[V, ...] to [C, W, ...]."""
    if missing := -logits_V.shape[0] % _BLOCK:
        padding = [(0, missing)] + [(0, 0)] * (logits_V.ndim - 1)
        logits_V = jnp.pad(logits_V, padding, constant_values=-jnp.inf)
    return logits_V.reshape(-1, _BLOCK, *logits_V.shape[1:])


def _take_best(logits_VB: Array) -> Array:
    """The argmax, the first of equals; in two steps it is several times as fast on CPU."""
    logits_CWB = _blocks(logits_VB)
    block_B = jnp.argmax(jnp.max(logits_CWB, axis=1), axis=0)
    found_WB = jnp.take_along_axis(logits_CWB, block_B[None, None], axis=0)[0]
    return (block_B * _BLOCK + jnp.argmax(found_WB, axis=0)).astype(jnp.int32)


def _sample(logits_V: Array, seed: Array, index: Array) -> Array:
    """A draw from softmax(logits), exact: a block by its mass, then a row of the block.

    Each by the Gumbel trick, which rounding of the logits hardly ever upsets (a draw by the
    cumulative distribution is upset among improbable tokens). Two steps need V / block + block
    random numbers, not V of them.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
    block_key, row_key = jax.random.split(key)
    logits_CW = _blocks(logits_V)
    mass_C = jax.nn.logsumexp(logits_CW, axis=-1)
    block = jnp.argmax(mass_C + jax.random.gumbel(block_key, mass_C.shape))
    row = jnp.argmax(logits_CW[block] + jax.random.gumbel(row_key, (_BLOCK,)))
    return (block * _BLOCK + row).astype(jnp.int32)


def _cut(logits_BV: Array, draw: Draw) -> Array:
    """-inf for what `top_k`, then `top_p`, leave out."""
    rank_BV = _order(logits_BV)
    count_B = jnp.where(draw.top_k_B > 0, draw.top_k_B, logits_BV.shape[-1]).astype(jnp.float32)
    edge_B = _find_edge(rank_BV, jnp.ones_like(logits_BV), count_B)
    logits_BV = jnp.where(rank_BV >= edge_B[:, None], logits_BV, -jnp.inf)
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    edge_B = _find_edge(rank_BV, weight_BV, draw.top_p_B * weight_BV.sum(axis=-1))
    edge_B = jnp.where(draw.top_p_B < 1, edge_B, 0)
    return jnp.where(rank_BV >= edge_B[:, None], logits_BV, -jnp.inf)


def _order(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Integers in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _find_edge(rank_BV: Array, weight_BV: Array, target_B: Array) -> Array:
    """The highest rank at and above which the weights still sum to the target: bit by bit.

    32 passes over the vocabulary and no sort, which would be slower and need the vocabulary whole.
    """

    def set_bit(i: Array, edge_B: Array) -> Array:
        higher_B = edge_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached_B = jnp.sum(weight_BV, axis=-1, where=rank_BV >= higher_B[:, None])
        return jnp.where(reached_B >= target_B, higher_B, edge_B)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(target_B.shape, jnp.uint32))
