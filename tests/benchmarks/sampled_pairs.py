"""What pairs from a model's own answers do for it, in the embedded world.

    python tests/benchmarks/sampled_pairs.py --workdir runs --out sampled_pairs.json

Base and CPT are trained as configs/fictional_{base,cpt}.py say; then the CPT model's answers are
sampled, judged and paired by each strategy, RPO trains on the pairs, and so do the rounds of
configs/fictional_rounds.py. Told are the held-out measures before and after, and how many of the
exam's test questions each model answers rightly when it explains first. What is finished in
`workdir` is found again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.examine import Plan, take_exam
from rpo_jax.exams.asking import ANSWER_ONLY, EXPLAIN_FIRST, Drawing
from rpo_jax.exams.exam import find_exam
from rpo_jax.iterate import list_rounds, run_round
from rpo_jax.train import build, train

REPO = Path(__file__).resolve().parents[2]
SHOWN = ("preference_accuracy", "reward_accuracy", "margin", "nll", "dpo")


def load(stage: str, workdir: str, **fields: Any) -> Config:
    """A committed config, changed."""
    words = [f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()]
    path = str(REPO / f"configs/fictional_{stage}.py")
    return cli.load_config(path, [f"--config.workdir={workdir}", *words])


def examine(folder: Path) -> dict[str, Any]:
    """Points of a model on the test questions, explaining first, at temperature 0."""
    drawing = Drawing({ANSWER_ONLY: 16, EXPLAIN_FIRST: 128})
    plan = Plan(
        find_exam("fictional"),
        modes=(EXPLAIN_FIRST,),
        shots=0,
        drawing=drawing,
        weigh=False,
        slots=64,
    )
    (model,) = take_exam(folder, plan)["models"]
    seed = model["modes"][EXPLAIN_FIRST]["seeds"]["0"]
    return {"right": seed["extracted"], "parse": seed["rates"]["parse"]}


def tell(result: dict[str, Any]) -> dict[str, Any]:
    """Of a round: the answers, the pairs, and the held-out measures."""
    held = {
        when: {name: round(values[name], 4) for name in SHOWN}
        for when, values in result["heldout"].items()
    }
    pairs = {split: found["relations"] for split, found in result["pairs"].items()}
    return {"from": result["from"], "answers": result["answers"], "pairs": pairs, "heldout": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs", help="where the runs go")
    parser.add_argument("--strategies", nargs="+", default=["hierarchy", "right_over_wrong"])
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    args = parser.parse_args()
    cpt = load("cpt", args.workdir)
    if not (cpt.folder / "summary.json").exists():
        for config in (load("base", args.workdir), cpt):
            train(build(config))
    found = {}
    for strategy in args.strategies:
        name = f"pairs-{strategy}"
        config = load("pairs", args.workdir, name=name, data__pair__strategy=strategy)
        found[name] = tell(run_round(config)) | {"exam": examine(config.folder)}
    for config in list_rounds(load("rounds", args.workdir)):
        found[config.name] = tell(run_round(config)) | {"exam": examine(config.folder)}
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=REPO, capture_output=True, text=True).stdout.strip()
    result = {
        "command": f"{Path(__file__).name} {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "optax")},
        "seeds": {"world": 0, "training": 0, "answers": [0, 1, 2, 3]},
        "cpt": {"exam": examine(cpt.folder)},
        "runs": found,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
