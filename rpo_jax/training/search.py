"""Which layout of a run on a slice is best: meshes, micro-batches, remat policies, compiled."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
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

_SEQ = (1, 2, 4)


def search(
    config: Config,
    shape: ModelShape,
    topology: Topology,
    cache: Path,
    tokens: float | None,
    meshes: int,
) -> list[Plan]:
    """Plans of the training step in several layouts: those that fit, the fastest first; the rest.

    The rows of a step stay what the config says. `data` joins slices and is 1 in each; `tensor` is
    at most the kv heads. Meshes are ordered by how little they have to send, and those whose state
    alone is too large are left out. On each the fewest micro-batches that fit are found under the
    policy that keeps least, then the policy that keeps most and still fits.

    Args:
        config: of the run; its mesh, micro-batches and remat policy are what is looked for.
        shape: of the network.
        topology: chips to compile for.
        cache: of compiled programs: a search that was stopped goes on where it was.
        tokens: whose cost is told; None: those of the run.
        meshes: how many are compiled for.

    Raises:
        UserError: no mesh holds the state, or divides the rows; or the compiler fails on all.
    """
    jobs = list(_candidates(config, shape, topology))
    if not jobs:
        raise UserError(
            f"{topology.name}: no mesh divides train.batch_rows={config.train.batch_rows} and has "
            "room for weights and optimizer: more chips, other batch_rows, or adapters"
        )
    jobs.sort(key=lambda job: _sent_bytes(job, topology))
    found, failure = [], None
    for number, job in enumerate(jobs[:meshes], 1):
        sizes = name_mesh(asdict(job.work.config.mesh))
        logging.info("mesh %d of %d (%d are possible): %s", number, meshes, len(jobs), sizes)
        try:
            for plan in _climb(job, shape, topology, cache, tokens):
                logging.info("  %s", format_line(plan))
                found.append(plan)
        except jax.errors.JaxRuntimeError as error:  # of one program; the others are worth a look
            logging.warning("warning: %s: the compiler failed: %s", sizes, str(error)[:500])
            failure = error
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
    for seq in _SEQ:
        for tensor in (n for n in (1, 2, 4, 8) if shape.num_key_value_heads % n == 0):
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


def _climb(
    job: Job, shape: ModelShape, topology: Topology, cache: Path, tokens: float | None
) -> Iterator[Plan]:
    """Plans on one mesh until one fits, and then with as much kept as fits."""
    config, mesh = job.work.config, job.work.mesh
    rows = config.train.batch_rows
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def plan(micro_batches: int, remat: str) -> Plan:
        tried = replace(
            config,
            train=replace(config.train, micro_batches=micro_batches),
            model=replace(config.model, remat=remat),
        )
        return plan_program("step", tried, shape, topology, cache, tokens)

    for count in (n for n in range(1, rows + 1) if rows % (n * shards) == 0):
        least = plan(count, REMAT[0])
        yield least
        if least["fits"]:
            break
    else:
        return
    room = (topology.chip.hbm_bytes - least["hbm_gb"]["total"] * 1e9) / topology.chip.devices
    tokens_here = job.tokens / count / (shards * mesh.shape["seq"])
    for remat in reversed(REMAT[1:]):
        kept = kept_width(shape, remat) * tokens_here / mesh.shape["tensor"] * _bytes(config)
        if kept < room:
            more = plan(count, remat)
            yield more
            if more["fits"]:
                return


def _bytes(config: Config) -> int:
    return 2 if config.model.compute_dtype == "bfloat16" else 4


def _sent_bytes(job: Job, topology: Topology) -> float:
    """About what a device receives in a step: weights over fsdp * seq, activations over tensor."""
    mesh = job.work.mesh.shape
    shape = job.work.network.shape
    width = _bytes(job.work.config)
    weights = job.holds["weights"]
    count = sum(leaf.size for leaf in jax.tree.leaves(weights)) / mesh["tensor"]
    gathered = 3 * width * count * (1 - 1 / (mesh["fsdp"] * mesh["seq"]))
    here = job.tokens / (mesh["data"] * mesh["fsdp"] * mesh["seq"])
    activations = here * shape.hidden_size * width * shape.num_hidden_layers
    return gathered + 3 * 4 * activations * (1 - 1 / mesh["tensor"])
