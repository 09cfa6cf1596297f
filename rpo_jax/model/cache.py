"""The network with a memory: keys and values of earlier tokens are kept, not computed again.

A row's past has two parts: a prefix that all rows share, held once, and what is the row's own. The
layers are unrolled: a scan would copy each layer's weights and cache at every token.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rpo_jax.model.quantize import count_inputs, turn
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

_KERNEL = jax.tree_util.DictKey("kernel")
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


def split_layers(params: Params, give_up: bool = False, turned: bool = False) -> Params:
    """The weights with their layers apart, as `forward_cached` takes them.

    The layers are copied, the rest is shared; weights that are apart already come back as they are.

    Args:
        params: of a `Network`.
        give_up: the stacked arrays are deleted one by one: never are two of them there twice.
        turned: kernels become `Turned`; for one CPU.
    """
    if isinstance(params["layers"], tuple):
        return params
    leaves, tree = jax.tree.flatten_with_path(layer_variables(params))
    apart = []
    for path, leaf in leaves:
        # The last key of a quantised kernel is its part.
        inputs = count_inputs(path[-2].key) if turned and path[-1] == _KERNEL else 0
        apart.append(_unstack(leaf, inputs))
        if give_up:
            jax.block_until_ready(apart[-1])
            leaf.delete()
    layers = tuple(jax.tree.unflatten(tree, layer) for layer in zip(*apart, strict=True))
    whole = {name: part for name, part in params.items() if name not in ("layers", "lora")}
    return whole | {"layers": layers}


@partial(jax.jit, static_argnums=1)
def _unstack(stacked: Array, turned_inputs: int) -> tuple[Any, ...]:
    return tuple(turn(leaf, turned_inputs) if turned_inputs else leaf for leaf in stacked)


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


def compute_logits(
    params: Params, x_BD: Float[Array, "B D"], used_vocab: int
) -> Float[Array, "V B"]:
    """Float32 logits; -inf for rows of the head from `used_vocab` on, which are no tokens.

    The vocabulary goes first, as the head lies: a CPU multiplies so up to twice as fast, and what
    reads the logits has the rows side by side. The barriers hold the compiler to that.

    Args:
        params: from `split_layers`.
        x_BD: states that predict a token.
        used_vocab: number of tokens.
    """
    table_VD = head_table(params).astype(x_BD.dtype)
    x_DB = jax.lax.optimization_barrier(x_BD.T)
    logits_VB = jnp.einsum("vd,db->vb", table_VD, x_DB, preferred_element_type=jnp.float32)
    if used_vocab < table_VD.shape[0]:
        is_token_V = jnp.arange(table_VD.shape[0]) < used_vocab
        logits_VB = jnp.where(is_token_V[:, None], logits_VB, -jnp.inf)
    return constrain(jax.lax.optimization_barrier(logits_VB), "act_vocab", "batch")


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
    start_B = places_BT[:, 0]
    own = KeysValues(_write(own.k_BKSH, k_BTKH, start_B), _write(own.v_BKSH, v_BTKH, start_B))
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    # Queries of a kv head side by side: M of a row, all B x M of them against the shared prefix.
    q_BKTGH = q_BTNH.reshape(rows, length, kv_heads, -1, width).swapaxes(1, 2) * width**-0.5
    q_BKMH = q_BKTGH.reshape(rows, kv_heads, -1, width)
    group = q_BKMH.shape[2]

    def beside(x_BKM: Array) -> Array:
        """[B, K, M, ...] to [K, B x M, ...]."""
        return x_BKM.swapaxes(0, 1).reshape(kv_heads, rows * group, *x_BKM.shape[3:])

    prefix_KMP = product("kmh,kph->kmp", beside(q_BKMH), prefix.k_BKSH[0])
    # Keys first, and held to that: with a few queries in front it is slower.
    own_BKSM = product("bksh,bkmh->bksm", own.k_BKSH, q_BKMH)
    own_BKMS = jax.lax.optimization_barrier(own_BKSM).swapaxes(2, 3)
    seen_BTS = jnp.arange(own_BKMS.shape[-1]) <= places_BT[:, :, None]
    seen_BMS = jnp.repeat(seen_BTS, heads // kv_heads, axis=1)
    own_BKMS = jnp.where(seen_BMS[:, None], own_BKMS, -jnp.inf)

    def apart(x_KM: Array) -> Array:
        """The inverse of `beside`."""
        return x_KM.reshape(kv_heads, rows, group, *x_KM.shape[2:]).swapaxes(0, 1)

    peak_BKM = jnp.maximum(
        jnp.max(own_BKMS, axis=-1), apart(jnp.max(prefix_KMP, axis=-1, initial=-jnp.inf))
    )
    prefix_KMP = jnp.exp(prefix_KMP - beside(peak_BKM)[..., None])
    own_BKMS = jnp.exp(own_BKMS - peak_BKM[..., None])
    total_BKM = own_BKMS.sum(-1) + apart(prefix_KMP.sum(-1))
    dtype = q_BTNH.dtype
    prefix_y_KMH = product("kmp,kph->kmh", prefix_KMP.astype(dtype), prefix.v_BKSH[0])
    y_BKMH = product("bkms,bksh->bkmh", own_BKMS.astype(dtype), own.v_BKSH) + apart(prefix_y_KMH)
    y_BKMH = (y_BKMH / total_BKM[..., None]).astype(dtype)
    y_BTKGH = y_BKMH.reshape(rows, kv_heads, length, -1, width).swapaxes(1, 2)
    return y_BTKGH.reshape(q_BTNH.shape), own
