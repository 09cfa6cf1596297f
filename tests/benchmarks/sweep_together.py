"""A grid of loss weights as one program, and as a run a point: the same numbers, and what it takes.

    python tests/benchmarks/sweep_together.py --workdir DIR --out sweep_together.json

Both sides are the command `python -m rpo_jax.sweep --config configs/fictional_sweep.py` (4 x 4
values of alpha and beta, 3 seeds), each in a process of its own, one after the other; base and CPT
are trained before. Seconds are those of the whole command, by the clock; of them "compiling" is
what jax spent in lowering and compiling. Losses and gradient norms are compared point by point over
the first ten steps, held-out measures at the end as means over seeds, in units of half their 95 %
interval. A finished side in DIR is not run again.
"""

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":  # run as a script, the folder of the repository is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rpo_jax.sweep import read_points
from rpo_jax.training.results import MEASURES, Point, average, collect, list_axes
from rpo_jax.training.run import read_metrics
from rpo_jax.writing import write_json
from tests.benchmarks.provenance import REPO, describe_run

COMPILING = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")
SIDES = {"apart": (), "together": ("--together",)}
FIRST_STEPS = 10


def run_command(words: list[str]) -> None:
    """One of our commands, timed: its figures are printed as the last line."""
    spent = 0.0

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal spent
        spent += duration_secs if event.rsplit("/", 1)[-1] in COMPILING else 0.0

    jax.monitoring.register_event_duration_secs_listener(listen)
    verb, *rest = words
    sys.argv = [verb, *rest]
    start = time.perf_counter()
    runpy.run_module(f"rpo_jax.{verb}", run_name="__main__")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "seconds": time.perf_counter() - start,
        "compiling": spent,
        "processor": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss / 2**20,
    }
    print(json.dumps(found))


def take(verb: str, *words: str) -> dict[str, Any]:
    """Runs a command in a process of its own; its figures."""
    command = [sys.executable, str(Path(__file__).resolve()), "--command", verb, *words]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def read_first_steps(point: Point) -> list[dict[str, float]]:
    """What a point's first steps logged."""
    rows = [row for row in read_metrics(point.config.folder) if "grad_norm" in row]
    return rows[:FIRST_STEPS]


def compare(apart: list[Point], together: list[Point]) -> dict[str, float]:
    """How far the two sides are from one another, at most; see above."""
    steps = [
        pair
        for points in zip(apart, together, strict=True)
        for pair in zip(*map(read_first_steps, points), strict=True)
    ]
    differences = {
        name: [abs(a[name] - b[name]) / abs(a[name]) for a, b in steps]
        for name in ("loss", "grad_norm")
    }
    worst = {f"{name}, first steps": max(shares) for name, shares in differences.items()}
    all_shares = [share for shares in differences.values() for share in shares]
    worst["values, first steps"] = len(all_shares)
    worst["of these within 1e-5"] = sum(share <= 1e-5 for share in all_shares)
    axes, results = list_axes(apart), [collect(points) for points in (apart, together)]
    for name in MEASURES:
        means = [average(rows, axes, name).values() for rows in results]
        worst[f"{name}, in half intervals"] = max(
            abs(one.value - other.value) / one.half if one.half else float(one != other)
            for one, other in zip(*means, strict=True)
        )
    return worst


def main() -> None:
    """Runs both sides and writes their figures."""
    if sys.argv[1:2] == ["--command"]:
        run_command(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--grid", choices=("full", "small"), default="full")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    os.chdir(args.workdir)
    for stage in ("base", "cpt"):
        take("train", f"--config={REPO}/configs/fictional_{stage}.py")
    config = f"{REPO}/configs/fictional_sweep.py:{args.grid}"
    sides, points = {}, {}
    for side, words in SIDES.items():
        kept = Path(f"{side}-{args.grid}.json")
        name = f"--config.name={side}-{args.grid}"
        if not kept.exists():
            write_json(kept, take("sweep", f"--config={config}", name, *words))
        sides[side] = json.loads(kept.read_text())
        points[side] = read_points(config, [name])
    steps = {side: sides[side]["seconds"] - sides[side]["compiling"] for side in SIDES}
    found = {
        **describe_run("jax"),
        "points": len(points["apart"]),
        **sides,
        "times": sides["apart"]["seconds"] / sides["together"]["seconds"],
        "times_without_compiling": steps["apart"] / steps["together"],
        "worst_difference": compare(points["apart"], points["together"]),
    }
    print(json.dumps(found, indent=2))
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
