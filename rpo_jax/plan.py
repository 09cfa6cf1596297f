"""What a run would take on chips that are not here: `python -m rpo_jax.plan --topology=v6e:8x8`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.errors import UserError
from rpo_jax.model.shape import ModelShape, load_shape
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.topology import Topology, open_topology
from rpo_jax.training.estimate import BASIS, Plan, plan_program
from rpo_jax.training.programs import PROGRAMS
from rpo_jax.training.run import find_shape
from rpo_jax.training.search import format_line
from rpo_jax.training.search import search as search_layouts
from rpo_jax.writing import write_json

EXAMPLES = (
    "--config configs/qwen25_72b_cpt.py --topology v5p:4x4x4",
    "--config configs/qwen25_72b_rpo.py:v6e:8x8 --topology v6e:8x8,v5p:4x4x4 --tokens 2e9",
    "--config 'configs/qwen25_72b_cpt.py:2*v6e:16x16' --topology '2*v6e:16x16'",
    "--config configs/qwen25_72b_cpt.py --topology v5p:4x4x4 --search",
    "--config configs/qwen25_mid_rpo_lora.py:7b-l4 --topology l4:1",
)
_UNTIMED = "unknown: the compiler for GPUs counts no cycles"


def main(
    config: Config,
    topology: str = "",
    program: str = "",
    tokens: str = "",
    json: str = "",
    search: bool = False,
) -> None:
    """Compiles the step of a run for TPU slices, without a TPU: does it fit, how fast is it.

    For GPUs of one host (h100:8) likewise, but for the time: their compiler counts no cycles.
    """
    if not topology:
        raise UserError("--topology is wanted: v6e:8x8, '2*v6e:16x16', h100:8; several with commas")
    jax.config.update("jax_platforms", "cpu")  # what is compiled runs nowhere
    length = _number("tokens", tokens) if tokens else None
    slices, programs = topology.split(","), _programs(program)
    opened = [open_topology(name) for name in slices]  # before anything is compiled
    if not search:
        check_meshes(config, opened)
    elif programs != ["step"]:
        raise UserError(f"--search lays out the training step: leave out --program={program}")
    elif untimed := [one.name for one in opened if not one.chip.clock_hz]:
        raise UserError(f"--search ranks by time, which is unknown of a GPU: {', '.join(untimed)}")
    plans: list[Plan] = []
    for slice_ in slices:
        if search:
            plans += (found := find(config, slice_, length))
            print(format_search(found), end="\n\n")
        for name in [] if search else programs:
            plans.append(plan(config, slice_, name, length))
            print(format_plan(plans[-1]), end="\n\n")
        if json:
            write_json(Path(json), plans)  # each time: the next may fail, or take long


def check_meshes(config: Config, topologies: Sequence[Topology]) -> None:
    """Refuses a config whose mesh cannot be laid over each of several topologies.

    Raises:
        UserError: names the first that it cannot.
    """
    for topology in topologies:
        try:
            make_mesh(config.mesh, topology.devices)
        except UserError as error:
            raise UserError(f"--topology={topology.name}: {error}") from error


def plan(config: Config, topology: str, program: str = "step", tokens: float | None = None) -> Plan:
    """The plan of a program of a run on one topology; see `training.estimate.plan_program`."""
    opened = open_topology(topology)
    logging.info("compiling %s for %s: a minute or two for a large model", config.name, topology)
    return plan_program(
        program, config, _shape(config), opened, Path(config.workdir) / "plans", tokens
    )


def find(config: Config, topology: str, tokens: float | None) -> list[Plan]:
    """Plans of a run's step in other layouts on one topology; see `training.search.search`."""
    opened = open_topology(topology)
    cache = Path(config.workdir) / "plans"
    return search_layouts(config, _shape(config), opened, cache, tokens)


def _shape(config: Config) -> ModelShape:
    return load_shape(config.model.shape) if config.model.shape else find_shape(config)


def _programs(names: str) -> list[str]:
    unknown = [name for name in names.split(",") if name not in PROGRAMS] if names else []
    if unknown:
        raise UserError(f"--program={names}: {unknown[0]} is none of {', '.join(PROGRAMS)}")
    return names.split(",") if names else ["step"]


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise UserError(f"--{name}={text}: a number is wanted, as in 2e9") from error
    if not number >= 1:
        raise UserError(f"--{name}={text}: must be at least 1")
    return number


def format_search(plans: list[Plan]) -> str:
    """What a search found, best first, as a table for the terminal."""
    best = plans[0]
    head = f"{best['run']} ({best['stage']}) on {best['topology']}: {best['chips']} chips, "
    head += f"{best['rows']} rows, {best['tokens_a_run']:,} tokens a step"
    return "\n".join([head, *map(format_line, plans), f"basis: {BASIS}"])


def format_plan(found: Plan) -> str:
    """A plan as a table for the terminal."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"
    lines = {
        "run": f"{found['run']} ({found['stage']}), {found['parameters']:,} parameters; trains "
        f"{found['trains']}",
        "topology": f"{found['topology']}: {found['chips']} chips; mesh {mesh}",
        "program": f"{found['program']}; attention {found['attention']}, remat {found['remat']}",
        "batch": f"{found['rows']} rows, {found['tokens_a_run']:,} tokens, in "
        f"{found['micro_batches']} micro-batches",
        "HBM a chip": _list_sizes(found["hbm_gb"]),
    }
    if not found["fits"]:
        lines["DOES NOT FIT"] = f"too large by {found['too_large_by_gb']} GB a chip"
        lines["would help"] = "; ".join(found["what_would_help"]) or "nothing this command knows"
        return _table(lines)
    if found["host_gb"]:
        lines["host's memory"] = (
            f"{found['host_gb']} GB a chip; copies to and fro cost no time here"
        )
    lines |= {
        "fits": "yes, by the compiler",
        "FLOPs a step": f"{found['model_tflops']:,} T of the model, "
        f"{found['recompute_tflops']:,} T recomputed",
    }
    lines |= _say_speed(found) if "seconds" in found else {"time a step": _UNTIMED}
    told = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return _table({**lines, "compiled in": f"{found['compile_seconds']} s, {told}"})


def _say_speed(found: Plan) -> dict[str, str]:
    seconds = found["seconds"]
    return {
        "collectives": "; ".join(
            f"over {axes}: {', '.join(f'{kind} {size} GB' for kind, size in kinds.items())}"
            for axes, kinds in found["collectives_gb"].items()
        )
        or "none",
        "time a step": f"{seconds['step']:.3f} s = {seconds['compute']:.3f} compiler's cycles + "
        f"{seconds['attention_kernels']:.3f} attention kernels + "
        f"{seconds['exposed_communication']:.3f} exposed communication",
        "no estimate": _list_unknown(found["ops_without_estimate"]),
        "speed": f"{found['tokens_per_s_per_chip']:,} tokens/s/chip, MFU {found['mfu']:.1%}",
        "cost": f"{found['run_chip_hours']:,} chip-hours for {found['run_tokens']:,.0f} tokens"
        + _say_whose(found),
        "basis": found["basis"],
    }


def _say_whose(found: Plan) -> str:
    """Ends the cost: whose tokens these are, where the command line does not say."""
    if "run_steps" not in found:
        return ""
    all_of = "all of" if found["program"] == "step" else "as many as in all of"
    return f", {all_of} the run's {found['run_steps']:,} steps"


def _list_sizes(sizes: dict[str, Any]) -> str:
    parts = ", ".join(
        f"{kind} {size}" for kind, size in sizes.items() if kind not in ("total", "chip")
    )
    return f"{sizes['total']} of {sizes['chip']} GB: {parts}"


def _list_unknown(counts: dict[str, int]) -> str:
    charged, free = counts["kernels_charged"], counts["kernels_free"]
    others = {code: n for code, n in counts.items() if not code.startswith("kernels_")}
    listed = ", ".join(f"{code} {n}" for code, n in sorted(others.items()))
    return (
        f"of {charged} kernels, charged above; of {free} kernels and {sum(others.values())} other "
        f"operations, which count nothing{f' ({listed})' if listed else ''}"
    )


def _table(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


if __name__ == "__main__":
    cli.run(
        main,
        examples=EXAMPLES,
        search="try meshes, micro-batches and remat policies of the step, and rank what fits",
        options={
            "topology": "to compile for: v6e:8x8, '2*v6e:16x16', h100:8; several with commas "
            "between, where the mesh of the config fits each",
            "program": f"of the run, with commas between: {', '.join(PROGRAMS)}; step unless said",
            "tokens": "whose cost is told; those of the config's run, train.steps of full rows, "
            "unless said",
            "json": "file to write the plans to as well",
        },
    )
