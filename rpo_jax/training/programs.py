"""The programs of a run, for devices that need not be there: what `plan` compiles."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rpo_jax.config import Config
from rpo_jax.generation.batching import SLOTS
from rpo_jax.generation.slots import Model, make_slots, write_tokens
from rpo_jax.model.cache import CACHE_AXES, make_cache
from rpo_jax.model.qwen2 import Network, Params, make_network
from rpo_jax.model.shape import ModelShape
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.rules import partition_spec
from rpo_jax.training.metrics import count_flops, count_recompute, forward_flops
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.state import (
    TrainState,
    abstract_state,
    abstract_weights,
    split_params,
    with_shardings,
)
from rpo_jax.training.step import make_score, make_step
from rpo_jax.training.workload import Workload, example_batch, full_batch, make_workload


@dataclass(frozen=True)
class Job:
    """One program of a run on a mesh.

    Attributes:
        program: its name in `PROGRAMS`.
        work: the run on its mesh.
        lower: traces and lowers it.
        holds: abstract arrays that it is given, by kind.
        beside: likewise, of arrays that lie on the devices meanwhile and that it does not read.
        rows: computed at once or, in micro-batches, one after the other.
        tokens: that one run of the program gets through; of decoding, tokens written.
        model_flops: useful ones.
        recompute_flops: those that are done again.
    """

    program: str
    work: Workload
    lower: Callable[[], jax.stages.Lowered]
    holds: dict[str, Any]
    beside: dict[str, Any]
    rows: int
    tokens: int
    model_flops: float
    recompute_flops: float


def make_job(program: str, config: Config, shape: ModelShape, devices: Any) -> Job:
    """A program of a run, on given devices.

    Args:
        program: step, the training step; reference, the forward pass over the reference model's
            pairs; decode, a token for each of the slots of `generate`.
        config: of the run.
        shape: of its network; the model folder itself is not needed.
        devices: that its mesh is laid over.

    Raises:
        UserError: the config cannot be run on these devices.
    """
    network = make_network(shape, config.model, config.lora)
    work = make_workload(config, network, make_mesh(config.mesh, devices))
    return PROGRAMS[program](work)


def _step(work: Workload) -> Job:
    state, frozen = abstract_run(work)
    batch = full_batch(work)
    return Job(
        "step",
        work,
        lambda: lower_step(work, state, frozen),
        {"weights": (state.params, frozen), "optimizer": state.optimizer},
        {},
        work.config.train.batch_rows,
        batch["tokens"].size,
        count_flops(work.network, batch),
        count_recompute(work.network, batch, work.config.train.keep_logits),
    )


def _reference(work: Workload) -> Job:
    """As `train` runs it before its first step, the optimizer being there already."""
    train = replace(work.config.train, batch_rows=work.micro_rows, micro_batches=1)
    part = replace(work, config=replace(work.config, train=train))
    state, frozen = abstract_run(work)
    params = {**frozen, **state.params}
    batch = full_batch(part)

    def lower() -> jax.stages.Lowered:
        scored = {name: x for name, x in example_batch(part).items() if name != "reference_logps"}
        with jax.set_mesh(work.mesh):
            return make_score(work, params).lower(params, jax.eval_shape(lambda: scored))

    flops = sum(forward_flops(work.network, batch).values())
    beside = {"optimizer": state.optimizer}
    return Job(
        "reference",
        work,
        lower,
        {"weights": params},
        beside,
        work.micro_rows,
        batch["tokens"].size,
        flops,
        0.0,
    )


def _decode(work: Workload) -> Job:
    """One token for each slot of `generate` with its default number of them, all of them full."""
    config, mesh = work.config, work.mesh
    dtype = config.model.compute_dtype
    network = replace(work.network.base, param_dtype=dtype, compute_dtype=dtype)
    used_vocab = config.model.used_vocab_size or network.shape.vocab_size
    model = Model(network, used_vocab, (0,), chunk=32)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    slots = -(-SLOTS // shards) * shards
    written = config.data.response_length
    capacity = config.data.row_length
    if work.layout is not None:
        capacity = config.data.prompt_length + written
    weights = _apart(network, mesh)
    with jax.set_mesh(mesh):
        cache, rows = jax.eval_shape(lambda: make_slots(model, slots, capacity, written))
        prefix = jax.eval_shape(lambda: make_cache(network, 1, 0))
    everywhere = NamedSharding(mesh, P())
    cut = NamedSharding(mesh, partition_spec(CACHE_AXES))
    cache = with_shardings(cache, jax.tree.map(lambda _: cut, cache))
    rows = with_shardings(rows, jax.tree.map(lambda _: everywhere, rows))
    prefix = with_shardings(prefix, jax.tree.map(lambda _: everywhere, prefix))

    def lower() -> jax.stages.Lowered:
        used = jax.ShapeDtypeStruct((slots,), jnp.bool, sharding=everywhere)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        with jax.set_mesh(mesh):
            return write_tokens.lower(model, weights, prefix, cache, rows, used, count, count)

    one = np.ones((slots, 1), np.int32)
    batch = {"segment_ids": one, "positions": one * (capacity - 1), "target_mask": one}
    flops = sum(forward_flops(network, batch).values())
    held = {"weights": weights, "cache": (prefix, cache)}
    return Job("decode", work, lower, held, {}, slots, slots, flops, 0.0)


PROGRAMS: dict[str, Callable[[Workload], Job]] = {
    "step": _step,
    "reference": _reference,
    "decode": _decode,
}


def abstract_run(work: Workload) -> tuple[TrainState, Params]:
    """What a step changes and the weights it does not, abstract.

    To be made outside `jax.set_mesh`: nothing can be run on devices that are only compiled for.
    """
    tx = make_optimizer(work.config.optim)
    _, frozen = split_params(abstract_weights(work.network, work.mesh))
    return abstract_state(work.network, tx, work.mesh), frozen


def lower_step(work: Workload, state: TrainState, frozen: Params) -> jax.stages.Lowered:
    """The step of a workload, traced and lowered for the devices of its mesh."""
    batch = jax.eval_shape(lambda: example_batch(work))
    hyper = jax.eval_shape(lambda: work.hyper)
    step = make_step(work, make_optimizer(work.config.optim), state)
    with jax.set_mesh(work.mesh):
        return step.lower(state, frozen, hyper, batch)


def _apart(network: Network, mesh: Mesh) -> Params:
    """The weights as `model.cache.split_layers` leaves them, abstract."""
    whole = abstract_weights(network, mesh)

    def first(leaf: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, P(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)

    layer = {"params": jax.tree.map(first, whole["layers"])}
    return {**whole, "layers": (layer,) * network.shape.num_hidden_layers}
