"""What a program would take on a TPU slice that is not here: memory, FLOPs, traffic, time."""

import gzip
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rpo_jax.config import Config
from rpo_jax.model.qwen2 import count_params
from rpo_jax.model.shape import ModelShape
from rpo_jax.sharding.hlo import read_program, sum_by_axes
from rpo_jax.sharding.mesh import compiler_options
from rpo_jax.sharding.speed import KERNEL_EFFICIENCY, estimate_seconds, kernel_flops
from rpo_jax.sharding.topology import Topology
from rpo_jax.training.programs import Job, make_job
from rpo_jax.training.workload import full_batch
from rpo_jax.writing import write_whole

Plan = dict[str, Any]

BASIS = (
    f"compiler's cycles; attention kernels taken to reach {KERNEL_EFFICIENCY:.0%} of peak, as one "
    "published step suggests, and transfers to share no links. Not measured on a TPU here: held "
    "against published steps of other code, times come out 1.05 times too long on v6e, 1.16 on v5e "
    "and 1.3 to 1.7 on v5p; on v4 and TPU7x nothing was compared, and the clock of TPU7x is a guess"
)

# Two releases of the compiler say it in two ways; both count arguments and temporaries.
_OUT_OF_MEMORY = re.compile(
    r"(?:Used |total memory required for HLO temporaries \()([\d.]+)([KMG])"
    r"(?: of |\) exceeds available HBM \()([\d.]+)([KMG])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# What the environment says to a compiler.
_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
# Bytes that are kept of a compiled program, and what XLA calls them.
_MEMORY = {
    "temporaries": "temp_size_in_bytes",
    "arguments": "argument_size_in_bytes",
    "outputs": "output_size_in_bytes",
    "aliases": "alias_size_in_bytes",
    "code": "generated_code_size_in_bytes",
    "host": "host_temp_size_in_bytes",
}


def plan_program(
    program: str,
    config: Config,
    shape: ModelShape,
    topology: Topology,
    cache: Path,
    tokens: float | None,
) -> Plan:
    """Compiles a program of a run for a topology, and reads off what it takes.

    Args:
        program: one of `training.programs.PROGRAMS`.
        config: of the run.
        shape: of the network; the model folder itself is not needed.
        topology: chips to compile for.
        cache: folder of compiled programs, by a digest of program, topology, versions and flags
            (`LIBTPU_INIT_ARGS`, `XLA_FLAGS`).
        tokens: whose cost is told; None: those of the run, all its steps with full rows.

    Returns:
        A plan, ready for JSON; units are in the names. `digest` is that of the compiled program,
        which is another where the code has changed. `fits` is False where the program is too
        large; then only `hbm_gb` tells of the program. Nothing is told of a GPU's time or traffic:
        its compiler counts no cycles.

    Raises:
        UserError: the config cannot be run on these devices.
    """
    job = make_job(program, config, shape, topology.devices)
    compiled = _compile(job.lower(), topology, cache, compiler_options(job.work.mesh))
    found = _facts(job, topology) | {"digest": compiled["digest"]}
    found |= _memory(job, topology, compiled)
    if found["fits"] and topology.chip.clock_hz:
        return found | _speed(job, topology, compiled, tokens)
    return found


def _compile(
    lowered: jax.stages.Lowered, topology: Topology, cache: Path, options: dict[str, str]
) -> dict[str, Any]:
    """Memory and optimized HLO of a program, from the cache where it has been compiled before.

    `options` are those that it was lowered with, and part of what tells it from others.
    """
    facts = [topology.name, *versions(topology).values(), options, *_MEMORY]
    facts += [topology.target] if topology.target else []
    flags = {name: os.environ[name] for name in _FLAGS if os.environ.get(name)}
    facts += [flags] if flags else []
    name = json.dumps(facts) + lowered.as_text()
    digest = hashlib.sha256(name.encode()).hexdigest()[:24]
    path = cache / f"{digest}.json.gz"
    if path.is_file():
        return json.loads(gzip.decompress(path.read_bytes())) | {"digest": digest}
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
            **{kind: getattr(memory, name) for kind, name in _MEMORY.items()},
            "hlo": compiled.as_text(),
        }
    result["compile_seconds"] = round(time.monotonic() - began, 1)
    cache.mkdir(parents=True, exist_ok=True)
    write_whole(path, gzip.compress(json.dumps(result).encode()))
    return result | {"digest": digest}


def versions(topology: Topology) -> dict[str, str]:
    """Of what compiles for a topology."""
    compiler = "libtpu" if topology.chip.clock_hz else "jax-cuda12-pjrt"
    return {name: version(name) for name in ("jax", compiler)}


def _facts(job: Job, topology: Topology) -> Plan:
    config, mesh = job.work.config, job.work.mesh
    return {
        "run": config.name,
        "stage": config.stage,
        "program": job.program,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "trains": f"adapters of rank {config.lora.rank} over "
        f"{config.lora.quantize or config.model.param_dtype}"
        if config.lora.rank
        else "all weights",
        "attention": config.model.attention,
        "remat": config.model.remat + (", offloaded" if config.model.offload else ""),
        "rows": job.rows,
        "micro_batches": config.train.micro_batches if job.program == "step" else 1,
        "tokens_a_run": job.tokens,
        "parameters": count_params(job.work.network),
        "model_tflops": round(job.model_flops / 1e12, 1),
        "recompute_tflops": round(job.recompute_flops / 1e12, 1),
        "versions": versions(topology),
    }


def _memory(job: Job, topology: Topology, compiled: dict[str, Any]) -> Plan:
    """GB a chip (10^9 bytes) by kind, against what the chip has."""
    each = topology.chip.devices / 1e9
    held = {kind: local_bytes(tree) * each for kind, tree in job.holds.items()}
    beside = {kind: local_bytes(tree) * each for kind, tree in job.beside.items()}
    has = topology.chip.hbm_bytes / 1e9
    compile_seconds = {"compile_seconds": compiled["compile_seconds"]}
    if compiled["fits"]:
        results = compiled["outputs"] - compiled["aliases"]
        kinds = {
            **held,
            **beside,
            "batch": compiled["arguments"] * each - sum(held.values()),
            "temporaries": (compiled["temporaries"] + results) * each,
            "code": compiled["code"] * each,
        }
        total = sum(kinds.values())
    else:
        kinds = {**held, **beside}
        total = compiled["used"] * each + sum(beside.values())
    sizes = {name: round(size, 2) for name, size in {**kinds, "total": total, "chip": has}.items()}
    if compiled["fits"] and total <= has:
        host = round(compiled["host"] * each, 2)
        return {"fits": True, "hbm_gb": sizes, "host_gb": host, **compile_seconds}
    return {
        "fits": False,
        "hbm_gb": sizes,
        "too_large_by_gb": round(total - has, 2),
        "what_would_help": advise(job, topology, {**held, **beside}, total, has),
        **compile_seconds,
    }


def advise(
    job: Job, topology: Topology, state: dict[str, float], used: float, limit: float
) -> list[str]:
    """What would make room for a program: what its config can say, and this program heeds.

    Args:
        job: the program.
        topology: chips that it is for.
        state: GB a chip of what lies there before it runs, by kind.
        used: GB a chip of all that it takes.
        limit: GB that a chip has.
    """
    config, mesh = job.work.config, job.work.mesh.shape
    advice = []
    if job.program == "step" and config.model.remat != "full":
        advice.append("--config.model.remat=full recomputes layers instead of keeping them")
    if mesh["data"] > topology.slices:
        copied = " and ".join(kind for kind in state if kind != "cache")
        advice.append(
            f"mesh.data={mesh['data']} holds as many copies of {copied}: "
            f"{topology.slices} will do, with a larger mesh.fsdp"
        )
    is_large = sum(state.values()) > limit / 2
    if job.program == "decode":
        advice += _advise_decoding(config, state["cache"])
    else:
        advice += _advise_rows(job)
        advice += _advise_weights(config) if is_large else []
    if is_large:
        advice.append(
            f"{' and '.join(state)} alone take {sum(state.values()):.1f} GB a chip: about "
            f"{math.ceil(used / limit) * topology.chips} chips"
        )
    return advice


def _advise_decoding(config: Config, cache: float) -> Iterator[str]:
    lengths = "data.row_length"
    if config.stage == "rpo":
        lengths = "data.prompt_length or data.response_length"
    yield f"a smaller {lengths}: the cache takes {cache:.1f} GB a chip"
    if config.model.compute_dtype == "float32":
        yield "--config.model.compute_dtype=bfloat16: weights and cache in half the bytes"


def _advise_rows(job: Job) -> Iterator[str]:
    """Of what is computed at once."""
    train, mesh = job.work.config.train, job.work.mesh.shape
    shards = mesh["data"] * mesh["fsdp"]
    counts = range(train.micro_batches + 1, train.batch_rows + 1)
    if finer := next((n for n in counts if train.batch_rows % (n * shards) == 0), None):
        yield f"--config.train.micro_batches={finer}: fewer rows at once"
    elif mesh["seq"] * mesh["tensor"] < 8:
        divides = job.work.network.shape.num_key_value_heads % (2 * mesh["tensor"]) == 0
        axes = "mesh.seq or mesh.tensor" if divides else "mesh.seq"
        yield f"a larger {axes} cuts each row's activations"


def _advise_weights(config: Config) -> Iterator[str]:
    """Of the form that they are held in while a run trains."""
    if config.model.param_dtype == "float32":
        yield "--config.model.param_dtype=bfloat16: weights in half the bytes"
    if not config.lora.rank:
        yield "--config.lora.rank trains adapters, and the rest has no optimizer's moments"
    elif config.lora.quantize != "nf4":
        yield "--config.lora.quantize=nf4: frozen kernels in four bits"


def _speed(job: Job, topology: Topology, compiled: dict[str, Any], tokens: float | None) -> Plan:
    program = read_program(compiled["hlo"])
    mesh = job.work.mesh
    seconds = estimate_seconds(program, topology, list(mesh.devices.flat))
    rate = job.tokens / seconds.step / topology.chips
    traffic = sum_by_axes(program, dict(mesh.shape))
    asked: Plan = {}
    if tokens is None:
        asked = {"run_steps": job.work.config.train.steps}
        tokens = asked["run_steps"] * full_batch(job.work)["tokens"].size
    return {
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
        "ops_without_estimate": {
            "kernels_charged": sum(kernel_flops(kernel) > 0 for kernel in program.kernels),
            "kernels_free": sum(kernel_flops(kernel) == 0 for kernel in program.kernels),
            **program.unknown,
        },
        "tokens_per_s_per_chip": round(rate, 1),
        "mfu": round(job.model_flops / seconds.step / topology.chip.flops / topology.chips, 4),
        "run_tokens": tokens,
        **asked,
        "run_chip_hours": round(tokens / rate / 3600, 1),
        "basis": BASIS,
    }


def local_bytes(abstract: object) -> int:
    """Bytes of a sharded tree on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * _bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(abstract)
    )


def _bits(dtype: np.dtype) -> int:
    """Of one value where the compiler puts it: numpy gives a whole byte to four bits."""
    return 4 if dtype.name in ("int4", "uint4") else 8 * dtype.itemsize
