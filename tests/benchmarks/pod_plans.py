"""The table of docs/plans.md: every committed config of a slice or a GPU, compiled for it.

    python tests/benchmarks/pod_plans.py --cache runs/plans
    python tests/benchmarks/pod_plans.py --cache runs/plans --search

Writes the table, and all plans as JSON beside this file. Compiled programs are found again in the
cache; without it the whole takes about a minute a line on two cores. `--only=v6e` makes the lines
that contain a word, the others stay as they are. `--search` looks for the best mesh, micro-batches
and remat policy of each 72B config as `rpo_jax.plan --search` does, some ten minutes a line, and
tells how the committed ones stand.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":  # run as a script, the folder of the repository is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rpo_jax.cli import load_config
from rpo_jax.errors import UserError
from rpo_jax.model.shape import load_shape
from rpo_jax.sharding.topology import open_topology
from rpo_jax.training.estimate import BASIS, plan_program
from rpo_jax.training.search import name_mesh, search
from rpo_jax.writing import write_json
from tests.benchmarks.provenance import REPO, describe_run
from tests.lowering.test_configs import MID, PODS

FIGURES = Path(__file__).with_suffix(".json")
TABLE = REPO / "docs" / "plans.md"

# Programs beside the training step: config, slice, program.
OTHERS = [
    ("configs/qwen25_72b_rpo_lora.py:v6e:2x2", "v6e:2x2", "reference"),
    ("configs/qwen25_72b_rpo.py:v5p:4x4x4", "v5p:4x4x4", "reference"),
    ("configs/qwen25_72b_rpo_lora.py:v6e:2x4", "v6e:2x4", "decode"),
]
# Of decoding: weights gathered for each token would be what takes the time.
OVERRIDES = {"decode": ("--config.mesh.fsdp=1", "--config.mesh.tensor=8")}
SEARCHES = [(path, slice_, "step") for path, slice_ in PODS]
LINES = [(path, slice_, "step") for path, slice_ in PODS + MID] + OTHERS


def name_line(path: str, slice_: str, program: str) -> str:
    return f"{path} {slice_} {program}"


def plan_line(path: str, slice_: str, program: str, cache: Path) -> dict[str, Any]:
    config = load_config(path, OVERRIDES.get(program, ()))
    shape = load_shape(config.model.shape)
    plan = plan_program(program, config, shape, open_topology(slice_), cache, 1e9)
    return {**plan, "config": path}


def format_row(plan: dict[str, Any]) -> str:
    sizes = plan["hbm_gb"]
    cells = [
        f"`{plan['config'].removeprefix('configs/')}`",
        plan["program"],
        plan["topology"],
        str(plan["chips"]),
        name_mesh(plan["mesh"]),
        f"{plan['rows']} / {plan['micro_batches']}",
        plan["remat"],
        f"{sizes['total']:.1f} of {sizes['chip']:.1f}",
    ]
    if not plan["fits"]:
        cells += [f"too large by {plan['too_large_by_gb']} GB", "", ""]
    elif "seconds" not in plan:
        cells += ["", "", ""]
    else:
        seconds = plan["seconds"]
        cells += [
            f"{seconds['step']:.2f} = {seconds['compute']:.2f} + {seconds['attention_kernels']:.2f}"
            f" + {seconds['exposed_communication']:.2f}",
            f"{plan['tokens_per_s_per_chip']:,.0f}",
            f"{plan['mfu']:.1%}",
        ]
    cells.append(f"{plan['compile_seconds']:.0f} s")
    return "| " + " | ".join(cells) + " |"


HEAD = """# What fits where, by the compiler

Written by `python tests/benchmarks/pod_plans.py` (figures: `tests/benchmarks/pod_plans.json`).
{told}

Each line is a committed config, compiled for its slice by libtpu {libtpu} under jax {jax}, without
a TPU (they want Python 3.12 or later); those of GPUs (l4, h100) by {gpu}
(Python 3.11), without one. GB are 10^9 bytes a chip, of what the compiler lets a program have, or
of the three quarters of a GPU that jax takes. Of a GPU's time nothing is known. Seconds are
{basis}
([estimates.md](estimates.md)). MFU counts useful work only: a prompt once for both of its
responses, no recomputation, and no gradients of frozen weights.

| config | program | slice | chips | mesh | rows / micro-batches | remat | GB a chip | \
s = compute + kernels + exposed communication | tokens/s/chip | MFU | compiled in |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def search_line(path: str, slice_: str, cache: Path) -> dict[str, Any]:
    """What a search finds: by which compiler, and the layouts and what they take, best first."""
    config = load_config(path)
    shape = load_shape(config.model.shape)
    plans = search(config, shape, open_topology(slice_), cache, 1e9)
    names = (
        *("mesh", "micro_batches", "remat", "digest"),
        *("fits", "hbm_gb", "seconds", "tokens_per_s_per_chip"),
    )
    layouts = [{name: plan[name] for name in names if name in plan} for plan in plans]
    return {"layouts": layouts, "versions": plans[0]["versions"]}


def same_layout(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("mesh", "micro_batches", "remat"))


def format_layout(plan: dict[str, Any]) -> str:
    return f"{name_mesh(plan['mesh'])}, {plan['micro_batches']} micro-batches, {plan['remat']}"


def format_found(key: str, found: dict[str, Any], plan: dict[str, Any]) -> str:
    """A row: the committed layout against the best of those that were compiled."""
    fitting = [one for one in found["layouts"] if one["fits"]]
    best = fitting[0]
    chosen = plan["seconds"]["step"]
    cells = [
        f"`{key.split()[0].removeprefix('configs/')}`",
        f"{len(found['layouts'])}, {len(fitting)} fit",
        format_layout(best),
        f"{best['seconds']['step']:.2f} s",
        "the same" if same_layout(best, plan) else format_layout(plan),
        f"{chosen:.2f} s, {chosen / best['seconds']['step']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


SEARCHED = """
## What the search finds

`python tests/benchmarks/pod_plans.py --search`: every size of `tensor` with the smallest `seq` that
fits, on each mesh the fewest micro-batches that fit and the policies that keep more; the last
column is the committed layout's time over the best one's. Committed ones leave a chip a gigabyte:
what is 2 or 3 % faster and leaves less is not taken. {told}

| config | compiled | best | a step | committed | a step, against the best |
|---|---|---|---|---|---|
"""


def format_tables(figures: dict[str, Any]) -> str:
    """The text of docs/plans.md."""
    plans = [
        figures["plans"][key] for line in LINES if (key := name_line(*line)) in figures["plans"]
    ]
    minutes = sum(plan["compile_seconds"] for plan in plans) / 60
    machine = plans[0]["made"]["machine"].partition(", load")[0]
    told = f"{len(plans)} of {len(LINES)} lines have been compiled, in {minutes:.0f} minutes of "
    told += f"compiling ({machine}); commit and date of each are in the figures."
    versions = plans[0]["versions"]
    gpu = next(plan["versions"] for plan in plans if "libtpu" not in plan["versions"])
    gpu = " under ".join(f"{name} {number}" for name, number in sorted(gpu.items(), reverse=True))
    text = (
        HEAD.format(told=told, basis=BASIS, gpu=gpu, **versions)
        + "\n".join(map(format_row, plans))
        + "\n"
    )
    found = [
        format_found(key, searched, figures["plans"][key])
        for line in LINES
        if (searched := figures.get("searches", {}).get(key := name_line(*line)))
    ]
    if found:
        told = f"{len(found)} of {len(SEARCHES)} configs have been searched."
        text += SEARCHED.format(told=told) + "\n".join(found) + "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=REPO / "runs" / "plans")
    parser.add_argument("--search", action="store_true", help="look for the best layouts")
    parser.add_argument("--only", default="", help="make the lines that contain this")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"plans": {}}
    figures.setdefault("searches", {})
    for line in SEARCHES if args.search else LINES:
        key = name_line(*line)
        if args.only not in key:
            continue
        print(key, flush=True)
        made = describe_run()
        if args.search:
            figures["searches"][key] = {**search_line(*line[:2], args.cache), "made": made}
        else:
            try:
                plan = plan_line(*line, args.cache)
            except UserError as error:  # no compiler for its chips in this environment
                print(f"  left as it was: {error}", flush=True)
                continue
            figures["plans"][key] = {**plan, "made": made}
        write_json(FIGURES, figures)
        TABLE.write_text(format_tables(figures), "utf-8")


if __name__ == "__main__":
    main()
