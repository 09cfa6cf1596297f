"""What a step changes, and its abstract twin."""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from rpo_jax.model.qwen2 import Network, Params, abstract_params, init_params, param_axes
from rpo_jax.sharding.rules import make_shardings


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "optimizer"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes: the number of steps done, the trained weights, optax's state.

    What else the model consists of is frozen and goes beside it: see `split_params`.
    """

    step: Any  # int32 scalar; abstract in the abstract twin
    params: Params
    optimizer: optax.OptState


def split_params(params: Params) -> tuple[Params, Params]:
    """The trained and the frozen part of the weights: adapters and the rest, or all and nothing."""
    if "lora" not in params:
        return params, {}
    trained: Params = {name: params[name] for name in ("lora", "rows") if name in params}
    return trained, {name: value for name, value in params.items() if name not in trained}


def join_params(trained: Params, frozen: Params) -> Params:
    """The whole model again."""
    return {**frozen, **trained}


def abstract_weights(network: Network, mesh: Mesh) -> Params:
    """Shapes, dtypes and places of the weights on a mesh, adapters included."""
    abstract = abstract_params(network)
    return with_shardings(abstract, make_shardings(abstract, param_axes(network), mesh))


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Abstract arrays that know where they live."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
    )


def abstract_state(network: Network, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and places of a whole state; the optimizer's arrays lie like their weights.

    One that is of another shape than its weight, as the factors of Adafactor are, lies everywhere.
    """
    params, _ = split_params(abstract_weights(network, mesh))
    everywhere = NamedSharding(mesh, P())
    shardings = optax.tree.map_params(
        tx,
        lambda leaf, weight: weight.sharding if leaf.shape == weight.shape else everywhere,
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda _: everywhere,
    )
    optimizer = with_shardings(jax.eval_shape(tx.init, params), shardings)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), params, optimizer)


def make_params(network: Network, mesh: Mesh, seed: int) -> Params:
    """Random weights (see `init_params`), made where they live."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(network, mesh))
    return jax.jit(partial(init_params, network), out_shardings=places)(jax.random.key(seed))


def start_from(
    params: Params, tx: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """A state at step 0 with given weights to train, which already lie where `abstract` says."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer)
    optimizer = jax.jit(tx.init, out_shardings=places)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
    return TrainState(step, params, optimizer)


@jax.jit
def _digest(params: Params) -> list[Array]:
    def one(leaf: Array) -> Array:
        if leaf.dtype in (jnp.int4, jnp.uint4):
            leaf = leaf.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, leaf.shape, axis
            )
        # An odd multiplier a place: swapped or changed values change the sum, whatever the mesh.
        mixed = (bits ^ (bits >> 16)) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    return [one(leaf) for leaf in jax.tree.leaves(params)]


def fingerprint_params(params: Params) -> str:
    """A digest of all weights, the same on any mesh; guards against mix-ups, not malice."""
    named = jax.tree_util.tree_leaves_with_path(params)
    digests = jax.device_get(_digest(params))
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {digest}"
        for (path, leaf), digest in zip(named, digests, strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
