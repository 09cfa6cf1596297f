"""Adapters that begin with B = 0 against A = 0, in the RPO stage of the embedded world.

    python tests/benchmarks/lora_init.py --workdir runs --out tests/benchmarks/lora_init.json

Base and CPT are trained once in `workdir` (finished runs are found again); then RPO with adapters
of rank 16 on all projections runs for each initialisation, learning rate and seed, on the same
pairs. Held-out measures are means over seeds with their standard deviation.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rpo_jax import cli
from rpo_jax.train import build, train
from rpo_jax.training.run import read_metrics

REPO = Path(__file__).resolve().parents[2]
SHOWN = ("loss", "dpo", "nll", "margin", "reward_accuracy", "preference_accuracy")


def run(stage: str, workdir: str, **fields: Any) -> Path:
    """Trains a stage unless it is finished; its folder."""
    words = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    path = str(REPO / f"configs/fictional_{stage}.py")
    config = cli.load_config(path, [f"--config.workdir={workdir}", *words])
    if not (config.folder / "summary.json").exists():
        train(build(config))
    return config.folder


def measure(folder: Path) -> dict[str, float]:
    """Held-out measures after training, and how early the dpo term left ln 2."""
    after = json.loads((folder / "summary.json").read_text())["heldout"]["after"]
    steps = [line for line in read_metrics(folder) if "dpo" in line]
    left = next((line["step"] for line in steps if abs(line["dpo"] - 0.6931472) > 0.01), None)
    return {name: after[name] for name in SHOWN} | {"left_ln2_at_step": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs", help="where the runs go")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=80, help="RPO steps a run")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    args = parser.parse_args()
    run("base", args.workdir)
    run("cpt", args.workdir)
    found: dict[str, list[dict[str, float]]] = {}
    for init, rate, seed in itertools.product(("b_zero", "a_zero"), args.rates, range(args.seeds)):
        folder = run(
            "rpo",
            args.workdir,
            name=f"{init}-{rate:g}-{seed}",
            seed=seed,
            lora__rank=16,
            lora__init=init,
            optim__learning_rate=rate,
            train__steps=args.steps,
        )
        found.setdefault(f"{init}, learning rate {rate:g}", []).append(measure(folder))
    means = {
        kind: {
            name: [
                statistics.mean(values),
                statistics.stdev(values) if len(values) > 1 else 0.0,
            ]
            for name in SHOWN
            if (values := [run[name] for run in runs])
        }
        for kind, runs in found.items()
    }
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "command": f"{Path(__file__).name} {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "optax")},
        "means_and_deviations": means,
        "runs": found,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
