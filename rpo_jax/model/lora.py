"""Low-rank adapters: what they add to a linear map, how they begin, and how they are merged.

An adapted kernel W acts as W + (alpha / R) A B, computed as x W + (alpha / R) (x A) B. The adapters
of all layers are one tree, `params["lora"]`; without that key the model is the base.

Source: arXiv:2106.09685; names and scale as in PEFT.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from rpo_jax.config import TARGETS, Lora
from rpo_jax.model.quantize import Params, count_inputs


def init_adapters(layers: Params, lora: Lora, key: Array) -> Params:
    """Adapters for the targets among stacked layers, float32; each begins as no change at all.

    Args:
        layers: as in `init_params`; only shapes are looked at.
        lora: rank, targets, and which factor begins as zeros. The other one is uniform within
            1/sqrt(its contracted size): A as PEFT draws it, B as arXiv:2406.08447 does.
        key: of the random factor.

    Returns:
        {"attention": {"q": {"a" [L, *inputs, R], "b" [L, R, *outputs]}, ...}, "mlp": {...}}.
    """

    def make(index: int, name: str, kernel: Any) -> Params:
        shape, cut = kernel.shape, 1 + count_inputs(name)
        a_shape, b_shape = (*shape[:cut], lora.rank), (shape[0], lora.rank, *shape[cut:])
        zero_b = lora.init == "b_zero"
        bound = 1 / math.sqrt(math.prod(shape[1:cut]) if zero_b else lora.rank)
        drawn = jax.random.uniform(
            jax.random.fold_in(key, index),
            a_shape if zero_b else b_shape,
            jnp.float32,
            minval=-bound,
            maxval=bound,
        )
        if zero_b:
            return {"a": drawn, "b": jnp.zeros(b_shape, jnp.float32)}
        return {"a": jnp.zeros(a_shape, jnp.float32), "b": drawn}

    return _map_targets(make, layers, lora)


def adapter_axes(layers: Params, lora: Lora) -> Params:
    """The logical axes of `init_adapters`, from those of the layers."""

    def make(_: int, name: str, axes: tuple[str, ...]) -> Params:
        cut = 1 + count_inputs(name)
        return {"a": (*axes[:cut], "lora_rank"), "b": (axes[0], "lora_rank", *axes[cut:])}

    return _map_targets(make, layers, lora)


def _map_targets(make: Callable[[int, str, Any], Params], layers: Params, lora: Lora) -> Params:
    """{room: {target: make(number, target, its kernel)}} over the targets that the layers have."""
    return {
        room: {
            name: make(TARGETS.index(name), name, layers[room][name]["kernel"])
            for name in sorted(set(layers[room]) & set(lora.targets))
        }
        for room in ("attention", "mlp")
        if set(layers[room]) & set(lora.targets)
    }


def take_rows(params: Params, ids_n: Int[Array, "n"]) -> Params:
    """What `params` gets for trained token rows: "rows" of each table, float32, and "row_ids".

    They begin as what the tables hold, and stand in for it from then on.
    """
    tables = [name for name in ("embed", "head") if name in params]
    rows = {name: params[name]["table"][ids_n].astype(jnp.float32) for name in tables}
    return {"rows": rows, "row_ids": ids_n}


def row_axes(axes: Params) -> Params:
    """The logical axes of `take_rows`, from those of the tables."""
    tables = [name for name in ("embed", "head") if name in axes]
    rows = {name: (None, axes[name]["table"][1]) for name in tables}
    return {"rows": rows, "row_ids": (None,)}


def without_adapters(params: Params) -> Params:
    """The frozen weights alone: no adapters, no trained token rows."""
    return {name: params[name] for name in params if name not in ("lora", "rows", "row_ids")}


def find_table(params: Params, name: str) -> Float[Array, "V D"]:
    """The table `name` with its trained rows in place."""
    table_VD = params[name]["table"]
    if "rows" not in params:
        return table_VD
    return put_rows(jax.lax.stop_gradient(table_VD), params["row_ids"], params["rows"][name])


def put_rows(
    table_VD: Float[Array, "V D"], ids_n: Int[Array, "n"], rows_nD: Float[Array, "n D"]
) -> Float[Array, "V D"]:
    """The table with other rows in some places."""
    return table_VD.at[ids_n].set(rows_nD.astype(table_VD.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: Array, factor: Array, inputs: int) -> Array:
    """The product x @ factor over `inputs` axes, in the dtype of x; float32 gradient of the factor.

    Left to jax the gradient of a bfloat16 product would be summed over devices in bfloat16, and
    only then become float32.
    """
    return jnp.tensordot(x, factor.astype(x.dtype), axes=inputs)


def _project_forward(x: Array, factor: Array, inputs: int) -> tuple[Array, tuple[Array, Array]]:
    return _project(x, factor, inputs), (x, factor)


def _project_backward(inputs: int, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, factor = saved
    leading = list(range(x.ndim - inputs))
    outputs = (list(range(len(leading), grad.ndim)), list(range(inputs, factor.ndim)))
    x_grad = jnp.tensordot(grad, factor.astype(grad.dtype), outputs)
    factor_grad = jnp.tensordot(x, grad, (leading, leading), preferred_element_type=jnp.float32)
    return x_grad, factor_grad


_project.defvjp(_project_forward, _project_backward)


def adapt(
    x: Float[Array, "B T ..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    lora: Lora,
    dropout_seed_B: UInt32[Array, "B"] | None = None,
) -> Float[Array, "B T ..."]:
    """What an adapter adds to a linear map: (alpha / R) (dropout(x) A) B.

    Args:
        x: inputs, [B, T, *inputs].
        a: [*inputs, R].
        b: [R, *outputs].
        lora: alpha and the dropout rate.
        dropout_seed_B: one for each row, so that a row meets the same mask in any micro-batch and
            on any mesh; None drops nothing.
    """
    if dropout_seed_B is not None:
        keep = 1 - lora.dropout

        def mask(seed: Array) -> Array:
            return jax.random.bernoulli(jax.random.key(seed), keep, x.shape[1:])

        x = jnp.where(jax.vmap(mask)(dropout_seed_B), x / keep, 0).astype(x.dtype)
    scale = lora.alpha / lora.rank
    return _project(_project(x, a, a.ndim - 1), b, 1) * jnp.asarray(scale, x.dtype)


def seed_dropout(adapters: Params, layers: int, seed_B: UInt32[Array, "B"]) -> Params:
    """The adapters, each with dropout seeds [L, B] of its own."""
    paths, tree = jax.tree.flatten(adapters, is_leaf=lambda node: "a" in node)

    def seeds(index: int) -> Array:
        def one(seed: Array) -> Array:
            return jax.random.bits(jax.random.fold_in(jax.random.key(seed), index), (layers,))

        return jax.vmap(one, out_axes=1)(seed_B)

    return jax.tree.unflatten(
        tree, [{**pair, "dropout_seed_B": seeds(index)} for index, pair in enumerate(paths)]
    )


def merge_kernel(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """W + scale A B of stacked layers, computed in float32, in the dtype of W."""
    change = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(a, b)
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)
