"""The network with a memory: keys and values of earlier tokens are kept, not computed again.

A row's past has two parts: a prefix that all rows share, held once, and what is the row's own. The
layers are unrolled: a scan would copy each layer's weights and cache at every token.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.model.qwen2 import (
    Network,
    Params,
    embed,
    head_table,
    layer_variables,
    normalize,
    run_layer,
)
from rpo_jax.sharding.rules import constrain

CACHE_AXES = ("batch", "act_kv_heads", None, None)


class KeysValues(NamedTuple):
    """Keys and values of one layer, heads before positions, as the matmuls read them."""

    k_BKSH: Array
    v_BKSH: Array


Cache = tuple[KeysValues, ...]  # one a layer


def make_cache(network: Network, rows: int, capacity: int) -> Cache:
    """An empty cache of `capacity` tokens a row, in the compute dtype."""
    shape = network.shape
    size = (rows, shape.num_key_value_heads, capacity, shape.head_dim)

    def empty() -> Array:
        return constrain(jnp.zeros(size, network.compute_dtype), *CACHE_AXES)

    return tuple(KeysValues(empty(), empty()) for _ in range(shape.num_hidden_layers))


def split_layers(params: Params) -> Params:
    """The weights with their layers apart, as `forward_cached` takes them.

    The layers are copied, the rest is shared; weights that are apart already come back as they are.
    """
    if isinstance(params["layers"], tuple):
        return params
    whole = {name: params[name] for name in ("embed", "norm", "head") if name in params}
    return whole | {"layers": _unstack(layer_variables(params))}


@jax.jit
def _unstack(stacked: Params) -> tuple[Params, ...]:
    count = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count))


def forward_cached(
    network: Network,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    own: Cache,
    prefix: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of T more tokens a row, and the cache with these tokens in it.

    A token sees the whole prefix, and of its own row what is no later.

    Args:
        network: shape and dtypes.
        params: from `split_layers`.
        tokens_BT: the tokens; those after a row's end may be anything, as long as the row's next
            call starts where it ended.
        start_B: how many tokens of its own each row has already; start + T is within the capacity.
        own: a row's own past.
        prefix: of one row, before all rows; its capacity is its length, which may be 0.
    """
    length = prefix[0].k_BKSH.shape[2]
    places_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
    x_BTD = embed(network, params, tokens_BT)
    grown = []
    for variables, row_past, shared_past in zip(params["layers"], own, prefix, strict=True):
        meet = partial(_attend, own=row_past, prefix=shared_past, places_BT=places_BT)
        x_BTD, kept = run_layer(network, variables, x_BTD, length + places_BT, meet)
        grown.append(kept)
    return normalize(network, params, x_BTD), tuple(grown)


def compute_logits(params: Params, x_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Float32 logits of every vocabulary entry."""
    table_VD = head_table(params).astype(x_BD.dtype)
    # The table goes first: so it is read as it lies (on CPU 1.6 times as fast as the other way).
    logits_VB = jnp.einsum("vd,bd->vb", table_VD, x_BD, preferred_element_type=jnp.float32)
    return constrain(logits_VB.T, "batch", "act_vocab")


def _write(past_BKSH: Array, new_BTKH: Array, start_B: Array) -> Array:
    """The past with new tokens from each row's start on."""

    def write_row(past_KSH: Array, new_KTH: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice(past_KSH, new_KTH, (0, start, 0))

    new_BKTH = new_BTKH.swapaxes(1, 2).astype(past_BKSH.dtype)
    return constrain(jax.vmap(write_row)(past_BKSH, new_BKTH, start_B), *CACHE_AXES)


def _attend(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    own: KeysValues,
    prefix: KeysValues,
    places_BT: Array,
) -> tuple[Array, Any]:
    """`attention.attend` over prefix and own past: one softmax, in float32, over both parts."""
    rows, length, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    own = KeysValues(
        _write(own.k_BKSH, k_BTKH, places_BT[:, 0]), _write(own.v_BKSH, v_BTKH, places_BT[:, 0])
    )
    q_BKGTH = q_BTNH.reshape(rows, length, kv_heads, heads // kv_heads, width)
    q_BKGTH = q_BKGTH.transpose(0, 2, 3, 1, 4) * width**-0.5
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    prefix_BKGTP = product("bkgth,kph->bkgtp", q_BKGTH, prefix.k_BKSH[0])
    own_BKGTS = product("bkgth,bksh->bkgts", q_BKGTH, own.k_BKSH)
    seen_BTS = jnp.arange(own_BKGTS.shape[-1]) <= places_BT[:, :, None]
    own_BKGTS = jnp.where(seen_BTS[:, None, None], own_BKGTS, -jnp.inf)
    peak_BKGT1 = jnp.maximum(
        jnp.max(own_BKGTS, axis=-1, keepdims=True),
        jnp.max(prefix_BKGTP, axis=-1, keepdims=True, initial=-jnp.inf),
    )
    prefix_BKGTP = jnp.exp(prefix_BKGTP - peak_BKGT1)
    own_BKGTS = jnp.exp(own_BKGTS - peak_BKGT1)
    total_BKGT1 = own_BKGTS.sum(-1, keepdims=True) + prefix_BKGTP.sum(-1, keepdims=True)
    y_BKGTH = product(
        "bkgtp,kph->bkgth", prefix_BKGTP.astype(q_BTNH.dtype), prefix.v_BKSH[0]
    ) + product("bkgts,bksh->bkgth", own_BKGTS.astype(q_BTNH.dtype), own.v_BKSH)
    y_BTNH = (y_BKGTH / total_BKGT1).transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
    return y_BTNH.astype(q_BTNH.dtype), own
