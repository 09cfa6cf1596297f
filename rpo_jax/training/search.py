"""Which layout of a run on a slice is best: meshes, micro-batches, remat policies, compiled."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import jax

from rpo_jax.config import Config
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.errors import UserError
from rpo_jax.model.remat import REMAT, kept_width
from rpo_jax.model.shape import ModelShape
from rpo_jax.sharding.topology import Topology
from rpo_jax.training.estimate import Plan, local_bytes, plan_program
from rpo_jax.training.programs import Job, make_job

_TENSOR = (1, 2, 4, 8)
_SEQ = (1, 2, 4)


def search(
    config: Config,
    shape: ModelShape,
    topology: Topology,
    cache: Path,
    tokens: float | None,
) -> list[Plan]:
    """Plans of the training step in several layouts: those that fit, the fastest first; the rest.

    The rows of a step stay what the config says. `data` joins slices and is 1 in each. Every size
    of `tensor` up to the kv heads is tried, that which has least to send first, each with the
    smallest `seq` that fits: a larger one sends keys and values on top, and is for rows that are
    too long, or too few. On a mesh the fewest micro-batches that fit are found under the policy
    that keeps least, then the policy that keeps most and still fits.

    Args:
        config: of the run; its mesh, micro-batches and remat policy are what is looked for.
        shape: of the network.
        topology: chips to compile for.
        cache: of compiled programs: a search that was stopped goes on where it was.
        tokens: whose cost is told; None: those of the run.

    Raises:
        UserError: no mesh holds the state, or divides the rows; or the compiler fails on all.
    """
    by_tensor = attrgetter("work.config.mesh.tensor")
    sizes = [list(jobs) for _, jobs in groupby(_candidates(config, shape, topology), by_tensor)]
    if not sizes:
        raise UserError(
            f"{topology.name}: no mesh divides train.batch_rows={config.train.batch_rows} and has "
            "room for weights and optimizer: more chips, other batch_rows, or adapters"
        )
    sizes.sort(key=lambda jobs: _sent_bytes(jobs[0]))
    found: list[Plan] = []
    failure = None

    def plan(tried: Config) -> Plan:
        found.append(plan_program("step", tried, shape, topology, cache, tokens))
        logging.info("  %s", format_line(found[-1]))
        return found[-1]

    for number, jobs in enumerate(sizes, 1):
        for job in jobs:
            mesh, before = name_mesh(asdict(job.work.config.mesh)), len(found)
            logging.info("size %d of %d of tensor: %s", number, len(sizes), mesh)
            try:
                _climb(job, topology, plan)
            except jax.errors.JaxRuntimeError as error:  # of one program; others are worth a look
                logging.warning("warning: %s: the compiler failed: %s", mesh, str(error)[:500])
                failure = error
            if any(one["fits"] for one in found[before:]):
                break
    if not found:
        raise UserError(f"{topology.name}: the compiler failed on every mesh: {failure}")
    return sorted(found, key=lambda plan: plan["seconds"]["step"] if plan["fits"] else float("inf"))


def name_mesh(sizes: Mapping[str, int]) -> str:
    """A mesh by the axes that it has devices on."""
    return " ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one device"


def format_line(plan: Plan) -> str:
    """A plan of a search in one line."""
    mesh, sizes = name_mesh(plan["mesh"]), plan["hbm_gb"]
    line = (
        f"{mesh:<24} {plan['micro_batches']:>3} micro-batches  {plan['remat']:<9} "
        f"{sizes['total']:>6.1f} of {sizes['chip']:.0f} GB"
    )
    if not plan["fits"]:
        return line + "  does not fit"
    return (
        f"{line}  {plan['seconds']['step']:>7.3f} s  {plan['tokens_per_s_per_chip']:>7,.0f} "
        f"tokens/s/chip  MFU {plan['mfu']:.1%}"
    )


def _candidates(config: Config, shape: ModelShape, topology: Topology) -> Iterator[Job]:
    """A step for each mesh, with the fewest micro-batches, that may be compiled."""
    each = len(topology.devices) // topology.slices
    limit = topology.chip.hbm_bytes / topology.chip.devices
    for tensor in (n for n in _TENSOR if shape.num_key_value_heads % n == 0):
        for seq in _SEQ:
            if each % (seq * tensor):
                continue
            mesh = MeshConfig(
                data=topology.slices, fsdp=each // (seq * tensor), seq=seq, tensor=tensor
            )
            candidate = replace(
                config,
                mesh=mesh,
                train=replace(config.train, micro_batches=1),
                model=replace(config.model, remat=REMAT[0]),
            )
            try:
                job = make_job("step", candidate, shape, topology.devices)
            except UserError:
                continue  # the rows or an array do not divide
            if sum(map(local_bytes, job.holds.values())) < limit:
                yield job


def _climb(job: Job, topology: Topology, plan: Callable[[Config], Plan]) -> None:
    """Plans on one mesh: the fewest micro-batches that fit, then with as much kept as fits."""
    config, mesh, shape = job.work.config, job.work.mesh.shape, job.work.network.shape
    rows, shards = config.train.batch_rows, mesh["data"] * mesh["fsdp"]

    plans: dict[int, Plan] = {}

    def fits(micro_batches: int) -> bool:
        train = replace(config.train, micro_batches=micro_batches)
        plans[micro_batches] = plan(replace(config, train=train))
        return bool(plans[micro_batches]["fits"])

    *fewer, most = (n for n in range(1, rows + 1) if rows % (n * shards) == 0)
    if not fits(most):
        return
    count = [*fewer, most][bisect_left(fewer, True, key=fits)]
    taken = plans[count]["hbm_gb"]["total"] * 1e9
    room = (topology.chip.hbm_bytes - taken) / topology.chip.devices
    tokens_here = job.tokens / count / (shards * mesh["seq"])
    train = replace(config.train, micro_batches=count)
    for remat in reversed(REMAT[1:]):
        kept = kept_width(shape, remat) * tokens_here / mesh["tensor"] * _bytes(config)
        if kept < room:
            more = replace(config, train=train, model=replace(config.model, remat=remat))
            if plan(more)["fits"]:
                return


def _bytes(config: Config) -> int:
    return 2 if config.model.compute_dtype == "bfloat16" else 4


def _sent_bytes(job: Job) -> float:
    """About what a device receives in a step: weights over fsdp * seq, activations over tensor.

    Trained weights are gathered for both passes and their gradients scattered, frozen ones are
    gathered as they are stored; how often micro-batches do so again is not known yet.
    """
    mesh, shape, width = job.work.mesh.shape, job.work.network.shape, _bytes(job.work.config)
    trained, frozen = job.holds["weights"]
    count = sum(leaf.size for leaf in jax.tree.leaves(trained)) / job.work.mesh.size
    gathered = (3 * width * count + 2 * local_bytes(frozen)) * (mesh["fsdp"] * mesh["seq"] - 1)
    here = job.tokens / (mesh["data"] * mesh["fsdp"] * mesh["seq"])
    activations = here * shape.hidden_size * width * shape.num_hidden_layers
    return gathered + 3 * 4 * activations * (1 - 1 / mesh["tensor"])
