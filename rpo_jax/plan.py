"""What a run would take on TPUs that are not here: `python -m rpo_jax.plan --topology=v6e:8x8`."""

import json
import logging
from pathlib import Path
from typing import Any

import jax

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.errors import UserError
from rpo_jax.model.shape import load_shape
from rpo_jax.sharding.topology import open_topology
from rpo_jax.training.estimate import Plan, plan_step
from rpo_jax.training.run import find_shape

_TOKENS = 1e9


def main(config: Config, topology: str = "", tokens: str = "", json: str = "") -> None:
    """Compiles the step of a run for TPU slices, without a TPU: does it fit, how fast is it."""
    if not topology:
        raise UserError("--topology is wanted: v6e:8x8, or several as v6e:8x8,2*v6e:16x16")
    jax.config.update("jax_platforms", "cpu")  # ours is compiled for TPUs, and runs nowhere
    plans = [plan(config, name, _number(tokens)) for name in topology.split(",")]
    print("\n\n".join(format_plan(found) for found in plans))
    if json:
        write_plans(Path(json), plans)


def plan(config: Config, topology: str, tokens: float = _TOKENS) -> Plan:
    """The plan of a run on one topology; see `training.estimate.plan_step`."""
    shape = load_shape(config.model.shape) if config.model.shape else find_shape(config)
    opened = open_topology(topology)
    logging.info("compiling %s for %s: a minute or two for a large model", config.name, topology)
    return plan_step(config, shape, opened, Path(config.workdir) / "plans", tokens)


def _number(tokens: str) -> float:
    try:
        return float(tokens or _TOKENS)
    except ValueError as error:
        raise UserError(f"--tokens={tokens}: a number is wanted, as in 2e9") from error


def write_plans(path: Path, plans: list[Plan]) -> None:
    """Writes plans as a JSON list."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(plans, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def format_plan(found: Plan) -> str:
    """A plan as a table for the terminal."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"
    lines = {
        "run": f"{found['run']} ({found['stage']}), {found['parameters']:,} parameters; trains "
        f"{found['trains']}",
        "topology": f"{found['topology']}: {found['chips']} chips; mesh {mesh}",
        "program": f"attention {found['attention']}, remat {found['remat']}",
        "batch": f"{found['rows']} rows of {found['row_tokens']} = {found['tokens_a_step']:,} "
        f"tokens a step, in {found['micro_batches']} micro-batches",
        "HBM a chip": _list_sizes(found["hbm_gb"]),
    }
    if not found["fits"]:
        lines["DOES NOT FIT"] = f"too large by {found['too_large_by_gb']} GB a chip"
        lines["would help"] = "; ".join(found["what_would_help"]) or "nothing this command knows"
        return _table(lines)
    seconds = found["seconds"]
    lines |= {
        "fits": "yes, by the compiler",
        "FLOPs a step": f"{found['model_tflops']:,} T of the model, "
        f"{found['recompute_tflops']:,} T recomputed",
        "collectives": "; ".join(
            f"over {axes}: {', '.join(f'{kind} {size} GB' for kind, size in kinds.items())}"
            for axes, kinds in found["collectives_gb"].items()
        )
        or "none",
        "time a step": f"{seconds['step']:.3f} s = {seconds['compute']:.3f} compiler's cycles + "
        f"{seconds['attention_kernels']:.3f} attention kernels + "
        f"{seconds['exposed_communication']:.3f} exposed communication",
        "speed": f"{found['tokens_per_s_per_chip']:,} tokens/s/chip, MFU {found['mfu']:.1%}",
        "cost": f"{found['run_chip_hours']:,} chip-hours for {found['run_tokens']:,.0f} tokens",
        "basis": found["basis"],
        "compiled in": f"{found['compile_seconds']} s, jax {found['versions']['jax']}, libtpu "
        f"{found['versions']['libtpu']}",
    }
    return _table(lines)


def _list_sizes(sizes: dict[str, Any]) -> str:
    parts = ", ".join(
        f"{kind} {size}" for kind, size in sizes.items() if kind not in ("total", "chip")
    )
    return f"{sizes['total']} of {sizes['chip']} GB: {parts}"


def _table(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


if __name__ == "__main__":
    cli.run(
        main,
        options={
            "topology": "slices to compile for, with commas between: v6e:8x8, 2*v6e:16x16",
            "tokens": "of the run whose cost is told; 1e9 unless said",
            "json": "file to write the plans to as well",
        },
    )
