"""The programs on the device: a fixed number of slots, each of which holds one completion.

Slots are filled from prompts a group at a time, and all slots advance together, a token a step.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rpo_jax.generation.sampling import Draw, choose
from rpo_jax.model.cache import CACHE_AXES, Cache, compute_logits, forward_cached, make_cache
from rpo_jax.model.qwen2 import Network, Params
from rpo_jax.sharding.rules import constrain


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["draw", "limit_B", "active_B", "length_B", "count_B", "tokens_BG", "logps_BG"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Rows:
    """What is known of the completion in each slot, besides its cache.

    Attributes:
        draw: how tokens are drawn.
        limit_B: most tokens to write.
        active_B: whether it goes on.
        length_B: of its own tokens, so many are in the cache: all but the newest.
        count_B: tokens written so far.
        tokens_BG: these tokens, then anything.
        logps_BG: their log-probabilities.
    """

    draw: Draw
    limit_B: Any
    active_B: Any
    length_B: Any
    count_B: Any
    tokens_BG: Any
    logps_BG: Any


@dataclass(frozen=True)
class Model:
    """What the programs are compiled for.

    Attributes:
        network: shape and dtypes.
        used_vocab: rows of the head from here on are no tokens and are never drawn.
        end_ids: tokens that end a completion.
        chunk: prompt tokens of a row that go through the network at a time.
    """

    network: Network
    used_vocab: int
    end_ids: tuple[int, ...]
    chunk: int


def _empty_rows(rows: int, longest: int) -> Rows:
    zero_B = jnp.zeros(rows, jnp.int32)
    draw = Draw(zero_B.astype(jnp.uint32), jnp.zeros(rows), zero_B, jnp.ones(rows))
    return Rows(
        draw=draw,
        limit_B=zero_B,
        active_B=zero_B > 0,
        length_B=zero_B,
        count_B=zero_B,
        tokens_BG=jnp.zeros((rows, longest), jnp.int32),
        logps_BG=jnp.zeros((rows, longest)),
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make_slots(model: Model, rows: int, capacity: int, longest: int) -> tuple[Cache, Rows]:
    """Empty slots: a cache of `capacity` tokens each, and room to write `longest`."""
    return make_cache(model.network, rows, capacity), _everywhere(_empty_rows(rows, longest))


@partial(jax.jit, static_argnums=0)
def read_prefix(model: Model, params: Params, tokens_P: Int[Array, " P"]) -> Cache:
    """The cache of a text that all prompts begin with; it may be empty."""
    length = tokens_P.shape[0]
    if not length:
        return make_cache(model.network, 1, 0)
    tokens_1P = jnp.pad(tokens_P, (0, -length % model.chunk))[None]
    nothing = make_cache(model.network, 1, 0)
    cache, _ = _read(model, params, nothing, tokens_1P, jnp.array([length]))
    return jax.tree.map(lambda x_BKSH: x_BKSH[:, :, :length], cache)


@partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def fill_slots(
    model: Model,
    params: Params,
    prefix: Cache,
    cache: Cache,
    rows: Rows,
    slot_R: Int[Array, " R"],
    tokens_RS: Int[Array, "R S"],
    length_R: Int[Array, " R"],
    draw_R: Draw,
    limit_R: Int[Array, " R"],
) -> tuple[Cache, Rows]:
    """Reads prompts and writes the first token of each; one whose slot does not exist is padding.

    Args:
        model: static.
        params: from `split_layers`.
        prefix: from `read_prefix`.
        cache: of all slots; given up.
        rows: likewise.
        slot_R: where each prompt goes.
        tokens_RS: the prompts after the prefix; S is a multiple of `model.chunk`.
        length_R: tokens of each, at least 1.
        draw_R: how the completion is drawn.
        limit_R: most tokens to write.
    """
    new_cache, last_RD = _read(model, params, prefix, tokens_RS, length_R)
    count_R = jnp.zeros_like(length_R)
    new = replace(
        _empty_rows(length_R.shape[0], rows.tokens_BG.shape[1]),
        draw=draw_R,
        limit_B=limit_R,
        active_B=count_R == 0,
        length_B=length_R,
        count_B=count_R,
    )
    new = _advance(model, params, last_RD, new)
    width = min(tokens_RS.shape[1], cache[0].k_BKSH.shape[2])
    cache = jax.tree.map(
        lambda whole, part: whole.at[slot_R, :, :width].set(part[:, :, :width], mode="drop"),
        cache,
        new_cache,
    )
    rows = jax.tree.map(lambda whole, part: whole.at[slot_R].set(part, mode="drop"), rows, new)
    return _place(cache), _everywhere(rows)


@partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def write_tokens(
    model: Model,
    params: Params,
    prefix: Cache,
    cache: Cache,
    rows: Rows,
    used_B: Array,
    steps: Array,
    free: Array,
) -> tuple[Cache, Rows]:
    """Writes up to `steps` tokens a slot.

    It stops early when no slot goes on, or when `free` slots could be filled anew.

    Args:
        model: static.
        params: from `split_layers`.
        prefix: from `read_prefix`.
        cache: of all slots; given up.
        rows: likewise.
        used_B: slots whose completion somebody waits for; the others rest.
        steps: most tokens to write.
        free: number of slots at rest; more than there are: never mind.
    """
    rows = replace(rows, active_B=rows.active_B & used_B)

    def goes_on(carry: tuple[Array, Cache, Rows]) -> Array:
        step, _, rows = carry
        resting = jnp.sum(~rows.active_B)
        return (step < steps) & (resting < free) & jnp.any(rows.active_B)

    def write(carry: tuple[Array, Cache, Rows]) -> tuple[Array, Cache, Rows]:
        step, cache, rows = carry
        newest_B1 = jnp.take_along_axis(rows.tokens_BG, rows.count_B[:, None] - 1, axis=1)
        x_B1D, cache = forward_cached(
            model.network, params, newest_B1, rows.length_B, cache, prefix
        )
        rows = replace(rows, length_B=rows.length_B + rows.active_B)
        return step + 1, cache, _advance(model, params, x_B1D[:, 0], rows)

    _, cache, rows = jax.lax.while_loop(goes_on, write, (jnp.zeros((), jnp.int32), cache, rows))
    return _place(cache), _everywhere(rows)


def _read(
    model: Model, params: Params, prefix: Cache, tokens_BS: Array, length_B: Array
) -> tuple[Cache, Array]:
    """Runs prompts through the network chunk by chunk: their cache, and each row's last state."""
    rows, width = tokens_BS.shape
    network, chunk = model.network, model.chunk
    last_BD = jnp.zeros((rows, network.shape.hidden_size), network.compute_dtype)

    def one(i: Array, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
        cache, last_BD = carry
        start = i * chunk
        tokens_BT = jax.lax.dynamic_slice_in_dim(tokens_BS, start, chunk, axis=1)
        start_B = jnp.full(rows, start, jnp.int32)
        x_BTD, cache = forward_cached(network, params, tokens_BT, start_B, cache, prefix)
        place_B = length_B - 1 - start
        here_B = (place_B >= 0) & (place_B < chunk)
        place_B11 = jnp.clip(place_B, 0, chunk - 1)[:, None, None]
        found_BD = jnp.take_along_axis(x_BTD, place_B11, axis=1)[:, 0]
        return cache, jnp.where(here_B[:, None], found_BD, last_BD)

    chunks = (jnp.max(length_B) + chunk - 1) // chunk
    return jax.lax.fori_loop(0, chunks, one, (make_cache(network, rows, width), last_BD))


def _advance(model: Model, params: Params, x_BD: Array, rows: Rows) -> Rows:
    """One more token for each active row, drawn by the state that predicts it."""
    logits_VB = compute_logits(params, x_BD, model.used_vocab)
    token_B, logp_B = choose(logits_VB, rows.draw, rows.count_B, rows.active_B)
    place_BG = jnp.arange(rows.tokens_BG.shape[1]) == rows.count_B[:, None]
    place_BG &= rows.active_B[:, None]
    count_B = rows.count_B + rows.active_B
    ended_B = jnp.isin(token_B, jnp.array(model.end_ids)) | (count_B >= rows.limit_B)
    return replace(
        rows,
        active_B=rows.active_B & ~ended_B,
        count_B=count_B,
        tokens_BG=jnp.where(place_BG, token_B[:, None], rows.tokens_BG),
        logps_BG=jnp.where(place_BG, logp_B[:, None], rows.logps_BG),
    )


def _place(cache: Cache) -> Cache:
    return jax.tree.map(lambda x_BKSH: constrain(x_BKSH, *CACHE_AXES), cache)


def _everywhere(rows: Rows) -> Rows:
    """Small, and read by every host: a copy on each device."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), rows)
