"""What a step would take on a TPU slice that is not here: memory, FLOPs, traffic, time."""

import gzip
import hashlib
import json
import math
import re
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rpo_jax.config import Config
from rpo_jax.model.qwen2 import Params, count_params, make_network
from rpo_jax.model.shape import ModelShape
from rpo_jax.sharding.hlo import read_program, sum_by_axes
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.speed import KERNEL_EFFICIENCY, estimate_seconds
from rpo_jax.sharding.topology import Topology
from rpo_jax.training.metrics import count_flops
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.state import TrainState, abstract_state, abstract_weights, split_params
from rpo_jax.training.step import make_step
from rpo_jax.training.workload import Workload, example_batch, make_workload

Plan = dict[str, Any]

# Two releases of the compiler say it in two ways; both count arguments and temporaries.
_OUT_OF_MEMORY = re.compile(
    r"(?:Used |total memory required for HLO temporaries \()([\d.]+)([KMG])"
    r"(?: of |\) exceeds available HBM \()([\d.]+)([KMG])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def plan_step(
    config: Config, shape: ModelShape, topology: Topology, cache: Path, tokens: float
) -> Plan:
    """Compiles the step that `train` would run, for a topology, and reads off what it takes.

    Args:
        config: of the run.
        shape: of the network; the model folder itself is not needed.
        topology: chips to compile for.
        cache: folder of compiled programs, by a digest of program, topology and versions.
        tokens: of the run whose cost is told.

    Returns:
        A plan, ready for JSON; units are in the names. `fits` is False where the program is too
        large; then only `hbm_gb` tells of the program.

    Raises:
        UserError: the config cannot be run on these devices.
    """
    network = make_network(shape, config.model, config.lora)
    work = make_workload(config, network, make_mesh(config.mesh, topology.devices))
    state, frozen = abstract_run(work)
    compiled = _compile(lower_step(work, state, frozen), topology, cache)
    return (
        _facts(work, topology)
        | _memory(work, state, frozen, topology, compiled)
        | (_speed(work, topology, compiled, tokens) if compiled["fits"] else {})
    )


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


def _compile(lowered: jax.stages.Lowered, topology: Topology, cache: Path) -> dict[str, Any]:
    """Memory and optimized HLO of the step, from the cache where it has been compiled before."""
    name = json.dumps([topology.name, *versions().values()]) + lowered.as_text()
    path = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json.gz"
    if path.is_file():
        return json.loads(gzip.decompress(path.read_bytes()))
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if not found:
            raise
        sizes = [float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3)]
        result: dict[str, Any] = {"fits": False, "used": sizes[0], "limit": sizes[1]}
    else:
        memory = compiled.memory_analysis()
        assert memory is not None, "every backend of XLA accounts for its memory"
        result = {
            "fits": True,
            "temporaries": memory.temp_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "hlo": compiled.as_text(),
        }
    result["compile_seconds"] = round(time.monotonic() - began, 1)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(gzip.compress(json.dumps(result).encode()))
    temporary.replace(path)
    return result


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {name: version(name) for name in ("jax", "libtpu")}


def _facts(work: Workload, topology: Topology) -> Plan:
    config, mesh = work.config, work.mesh
    return {
        "run": config.name,
        "stage": config.stage,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "trains": f"adapters of rank {config.lora.rank} over "
        f"{config.lora.quantize or config.model.param_dtype}"
        if config.lora.rank
        else "all weights",
        "attention": config.model.attention,
        "remat": config.model.remat,
        "rows": config.train.batch_rows,
        "micro_batches": config.train.micro_batches,
        "row_tokens": _row_tokens(work),
        "tokens_a_step": config.train.batch_rows * _row_tokens(work),
        "parameters": count_params(work.network),
        "versions": versions(),
    }


def _row_tokens(work: Workload) -> int:
    one = replace(work, config=replace(work.config, train=replace(work.config.train, batch_rows=1)))
    return int(example_batch(one)["tokens"].shape[1])


def _memory(
    work: Workload,
    state: TrainState,
    frozen: Params,
    topology: Topology,
    compiled: dict[str, Any],
) -> Plan:
    """GB a chip (10^9 bytes) by kind, against what the chip has."""
    each = topology.chip.devices
    weights = local_bytes((state.params, frozen)) * each / 1e9
    optimizer = local_bytes(state.optimizer) * each / 1e9
    has = topology.chip.hbm_bytes / 1e9
    if not compiled["fits"]:
        used, limit = compiled["used"] * each / 1e9, compiled["limit"] * each / 1e9
        kinds = {"weights": weights, "optimizer": optimizer, "total": used, "chip": has}
        help = _what_would_help(work, weights + optimizer, used, limit)
        return {
            "fits": False,
            "hbm_gb": {name: round(size, 2) for name, size in kinds.items()},
            "too_large_by_gb": round(used - limit, 2),
            "what_would_help": help,
            "compile_seconds": compiled["compile_seconds"],
        }
    kinds = {
        "weights": weights,
        "optimizer": optimizer,
        "batch": compiled["arguments"] * each / 1e9 - weights - optimizer,
        "temporaries": (compiled["temporaries"] + compiled["results"]) * each / 1e9,
        "code": compiled["code"] * each / 1e9,
    }
    kinds |= {"total": sum(kinds.values()), "chip": has}
    return {
        "fits": True,
        "hbm_gb": {name: round(size, 2) for name, size in kinds.items()},
        "compile_seconds": compiled["compile_seconds"],
    }


def _what_would_help(work: Workload, state: float, used: float, limit: float) -> list[str]:
    config, mesh = work.config, work.mesh
    advice = []
    if config.model.remat != "full":
        advice.append("--config.model.remat=full recomputes layers instead of keeping them")
    if mesh.shape["data"] > 1:
        advice.append(
            f"mesh.data={mesh.shape['data']} holds as many copies of weights and optimizer: move "
            "it to mesh.fsdp"
        )
    if work.micro_rows > mesh.shape["data"] * mesh.shape["fsdp"]:
        advice.append(
            f"--config.train.micro_batches={config.train.micro_batches * 2}: fewer rows at once"
        )
    elif mesh.shape["seq"] * mesh.shape["tensor"] < 8:
        advice.append("a larger mesh.seq or mesh.tensor cuts each row's activations")
    if state > 0.8 * limit:
        chips = math.ceil(used / limit) * mesh.size
        advice.append(
            f"weights and optimizer alone take {state:.1f} GB a chip: about {chips} chips, "
            "model.param_dtype=bfloat16, or adapters"
        )
    return advice


def _speed(work: Workload, topology: Topology, compiled: dict[str, Any], tokens: float) -> Plan:
    program = read_program(compiled["hlo"])
    seconds = estimate_seconds(program, topology, list(work.mesh.devices.flat))
    model_flops = count_flops(work.network, full_batch(work))
    per_step = work.config.train.batch_rows * _row_tokens(work)
    rate = per_step / seconds.step / topology.chips
    traffic = sum_by_axes(program, dict(work.mesh.shape))
    return {
        "model_tflops": round(model_flops / 1e12, 1),
        "recompute_tflops": round(_recompute(work, model_flops) / 1e12, 1),
        "collectives_gb": {
            axes: {kind: round(size / 1e9, 2) for kind, size in kinds.items()}
            for axes, kinds in traffic.items()
        },
        "compiler_cycles": program.cycles,
        "seconds": {
            "compute": round(seconds.compute, 4),
            "attention_kernels": round(seconds.kernels, 4),
            "exposed_communication": round(seconds.communication, 4),
            "step": round(seconds.step, 4),
        },
        "tokens_per_s_per_chip": round(rate, 1),
        "mfu": round(model_flops / seconds.step / topology.chip.flops / topology.chips, 4),
        "run_tokens": tokens,
        "run_chip_hours": round(tokens / rate / 3600, 1),
        "basis": "compiler's cycles; attention kernels taken to reach "
        f"{KERNEL_EFFICIENCY:.0%} of peak and transfers to share no links: not measured on a TPU",
    }


def full_batch(work: Workload) -> dict[str, np.ndarray]:
    """The example batch with every slot full: what a step computes at most."""
    batch = example_batch(work)
    length = batch["tokens"].shape[1]
    full = {**batch, "target_mask": np.ones_like(batch["target_mask"])}
    full["segment_ids"] = np.ones_like(full["segment_ids"])
    positions = np.arange(length)
    data, rpo = work.config.data, work.config.rpo
    if work.config.stage == "rpo":
        starts = data.prompt_length + np.arange(data.response_length)
        prompt = np.arange(data.prompt_length)
        parts = [prompt, starts, starts] if rpo.share_prefix else [prompt, starts] * 2
        positions = np.concatenate(parts)
    full["positions"] = np.broadcast_to(positions, full["positions"].shape)
    return full


def _recompute(work: Workload, model_flops: float) -> float:
    """FLOPs done again: with full recomputation a forward pass of all layers, the head left out."""
    if work.config.model.remat != "full":
        return 0.0
    shape = work.network.shape
    batch = full_batch(work)
    head = 6 * shape.vocab_size * shape.hidden_size * float(batch["target_mask"].sum())
    return (model_flops - head) / 3


def local_bytes(abstract: object) -> int:
    """Bytes of a sharded tree on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * _bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(abstract)
    )


def _bits(dtype: np.dtype) -> int:
    """Of one value where the compiler puts it: numpy gives a whole byte to four bits."""
    return 4 if dtype.name in ("int4", "uint4") else 8 * dtype.itemsize
