"""Measures models: held-out losses of a run, or an exam.

A run's newest checkpoint on its held-out data:

    python -m rpo_jax.evaluate --config configs/<name>.py

Answers made elsewhere, a line of JSON each (id and text, or the published prediction format):

    python -m rpo_jax.evaluate --score FILE --exam igakuqa --exam_dir DIR --year 2022
"""

import argparse
import sys
from json import dumps
from typing import Any

import jax

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.data.records import open_records
from rpo_jax.data.tokenizer import read_tokenizer
from rpo_jax.errors import UserError
from rpo_jax.exams.exam import Exam, find_exam, list_exams
from rpo_jax.exams.responses import read_responses
from rpo_jax.exams.scoring import mark_all, score
from rpo_jax.exams.tables import format_score
from rpo_jax.model.qwen2 import Params
from rpo_jax.prepare import prepare
from rpo_jax.train import build
from rpo_jax.training.evaluation import find_references, make_evaluate
from rpo_jax.training.origin import first_trained, load_run
from rpo_jax.training.run import check_same_run, check_vocabulary, write_json
from rpo_jax.training.state import abstract_weights, join_params, split_params
from rpo_jax.training.workload import Workload


def main(argv: list[str]) -> None:
    """Measures a run on held-out data (--config), or an exam (--score)."""
    if any(arg.lstrip("-").startswith("config") for arg in argv):
        cli.run(measure_run, ["evaluate", *argv], json="print one line of JSON, and no table")
        return
    args = _parse(argv)
    result = score_files(find_exam(args.exam), args.exam_dir, args.years, args.score)
    print(dumps(result, ensure_ascii=False) if args.json else format_score(result))


def measure_run(config: Config, json: bool = False) -> None:
    """Measures a run's newest checkpoint: nats/token of text, or accuracy and margins of pairs."""
    result = evaluate(build(config))
    print(dumps(result) if json else format_result(result))


def evaluate(work: Workload) -> dict[str, Any]:
    """Held-out means of the newest checkpoint of a run; also written to its evaluation.json.

    Raises:
        UserError: the run has no checkpoint, or is of another config.
    """
    config = work.config
    check_same_run(config, free=("workdir", "data.", "train.", "mesh.", "log.", "checkpoint."))
    tokenizer = read_tokenizer(config.folder / "model", config.tokenizer.end_of_text)
    check_vocabulary(config, tokenizer, work.network.shape)
    heldout = open_records(prepare(config, tokenizer).heldout)
    with jax.set_mesh(work.mesh):
        abstract = abstract_weights(work.network, work.mesh)
        step, params = load_run(config.folder, work.network, work.mesh)
        _, frozen = split_params(params)

        def first() -> Params:
            trained = first_trained(config, work.network, work.mesh, frozen)
            return join_params(trained, frozen)

        (reference,) = find_references(work, config.folder, [heldout], step, params, first)
        means = make_evaluate(work, abstract, heldout, reference)(params)
    result = {"run": str(config.folder), "step": step, "heldout": means}
    if jax.process_index() == 0:
        write_json(config.folder / "evaluation.json", result)
    return result


def format_result(result: dict[str, Any]) -> str:
    """The result as a table for the terminal."""
    lines = [f"{result['run']}, step {result['step']}, held out:"]
    lines += [f"  {name:<22}{value:>12.4f}" for name, value in result["heldout"].items()]
    return "\n".join(lines)


def score_files(
    exam: Exam, directory: str, years: tuple[int, ...] | None, files: list[str]
) -> dict[str, Any]:
    """The scores of answers in files; see `exams.scoring.score`.

    Raises:
        UserError: the exam or the files are missing, broken, or do not fit each other.
    """
    questions = exam.read(exam.find(directory), years or exam.years or None)
    marks = mark_all(exam, questions, read_responses(files, questions))
    asked = sorted({question.year or 0 for question in questions})
    return {"exam": exam.name, "years": asked, "files": files, **score(exam, marks)}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rpo_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.py", help="a run to measure on held-out data")
    parser.add_argument("--score", metavar="FILE", nargs="+", help="answers, .jsonl; globs")
    parser.add_argument("--exam", default="igakuqa", help=f"one of {', '.join(list_exams())}")
    parser.add_argument("--exam_dir", default="", metavar="DIR", help="folder of its years")
    parser.add_argument(
        "--year", "--years", dest="years", type=_years, help="like 2022 or 2021,2022; default: all"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON, and no table")
    args = parser.parse_args(argv)
    if not args.score:
        raise UserError("--config=FILE.py (a run) or --score FILE is wanted; --help tells more")
    return args


def _years(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(year) for year in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: years like 2021,2022 are wanted") from error


if __name__ == "__main__":
    with cli.exit_on_error():
        main(sys.argv[1:])
