"""Pairs of the real exam by each strategy, from answers that were published, with the ledgers.

    python tests/benchmarks/igakuqa_pairs.py --answers 'answers/*.jsonl' --out igakuqa_pairs.json

The answers are the files of `baseline_results` of github jungokasai/IgakuQA (GPT-3, ChatGPT, GPT-4,
ChatGPT by translation, and the students' majority), answers alone, without explanations.
IGAKUQA_DIR names the exam.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rpo_jax import cli
from rpo_jax.exams.preferences import STRATEGIES
from rpo_jax.exams.split import split_exam
from rpo_jax.pair import describe, make_pairs
from rpo_jax.sample import gather

REPO = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", required=True, help="the published files, a glob")
    parser.add_argument("--workdir", default="runs", help="where the pairs go")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    args = parser.parse_args()
    found = {}
    for strategy in STRATEGIES:
        fields = {
            "workdir": args.workdir,
            "data.sample.files": f"('{args.answers}',)",
            "data.pair.strategy": strategy,
        }
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        config = cli.load_config(str(REPO / "configs/igakuqa_pairs.py"), words)
        folder = make_pairs(config)
        print(f"{describe(folder)}\n")
        info = json.loads((folder / "preferences.json").read_text())
        found[strategy] = {name: info[name] for name in ("summary", "ledgers")}
    answers = gather(config, split_exam(config)) / "candidates.json"
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=REPO, capture_output=True, text=True).stdout.strip()
    result = {
        "command": f"{Path(__file__).name} {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "answers": json.loads(answers.read_text())["summary"],
        "strategies": found,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
