"""Measures models: held-out losses of a run, or an exam.

A run's newest checkpoint on its held-out data:

    python -m rpo_jax.evaluate --config configs/<name>.py

A model takes an exam, answering only and explaining first; killed, it goes on where it was:

    python -m rpo_jax.evaluate --checkpoint runs/<name> --exam fictional

Answers made elsewhere, a line of JSON each (id and text, or the published prediction format):

    python -m rpo_jax.evaluate --score FILE --exam igakuqa --exam_dir DIR --year 2022

The report of a sitting, or the comparison of several, made again from the answers on disk:

    python -m rpo_jax.evaluate --report FOLDER [FOLDER ...] [--out FOLDER]

Flags can come from a file, one a line: `python -m rpo_jax.evaluate @configs/<name>.flags`.
"""

import argparse
import logging
import sys
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any

import jax

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.files import find_files
from rpo_jax.data.records import open_records
from rpo_jax.data.tokenizer import read_tokenizer
from rpo_jax.errors import UserError
from rpo_jax.examine import Plan, take_exam
from rpo_jax.exams.asking import (
    ANSWER_ONLY,
    EXPLAIN_FIRST,
    MODES,
    NEXT_QUESTION,
    Drawing,
    parse_share,
    read_sitting,
)
from rpo_jax.exams.exam import Exam, find_exam, list_exams
from rpo_jax.exams.phrasing import CHAT_CHOICES
from rpo_jax.exams.report import place_report, write_report
from rpo_jax.exams.responses import read_responses
from rpo_jax.exams.scoring import mark_all, score
from rpo_jax.exams.tables import format_report, format_score
from rpo_jax.model.qwen2 import Params
from rpo_jax.prepare import prepare
from rpo_jax.train import build
from rpo_jax.training.evaluation import find_references, make_evaluate, measure_divergence
from rpo_jax.training.measures import format_measures
from rpo_jax.training.origin import first_trained, load_params, load_run
from rpo_jax.training.run import check_same_run, check_vocabulary, read_fingerprints
from rpo_jax.training.state import abstract_weights, join_params, split_params
from rpo_jax.training.workload import Workload, make_workload
from rpo_jax.writing import write_json

_OTHERS = {"--checkpoint", "--score", "--report"}  # what is measured where it is no --config


def main(argv: list[str]) -> None:
    """Measures a run on held-out data (--config), or an exam (--checkpoint, --score, --report)."""
    flags = {arg.partition("=")[0] for arg in argv}
    if any(arg.startswith(("--config", "-config")) for arg in argv) and not flags & _OTHERS:
        cli.run(
            measure_run,
            ["evaluate", *argv],
            examples=(
                "--config configs/fictional_base.py",
                "--config configs/fictional_base.py --json",
            ),
            json="print one line of JSON, and no table",
            merged="of a run of adapters: measure the merged model too, and how far it is from the "
            "trained one",
        )
        return
    args = _parse(argv)
    if args.score:
        result = score_files(find_exam(args.exam), args.exam_dir, args.years, args.score)
        shown = format_score(result)
    elif args.report:
        folders = [Path(folder) for folder in args.report]
        exam = find_exam(read_sitting(folders[0]).exam)
        result = write_report(exam, folders, args.exam_dir, args.out)
        shown = format_report(result, place_report(folders, args.out))
    else:
        taken = take_exam(Path(args.checkpoint), _make_plan(args), parse_share(args.share))
        if taken is None:
            print(f"--share {args.share} is answered; the report comes with the last of the others")
            return
        (model,) = taken["models"]
        result, shown = taken, format_report(taken, place_report([Path(model["folder"])]))
    print(dumps(result, ensure_ascii=False) if args.json else shown)


def measure_run(config: Config, json: bool = False, merged: bool = False) -> None:
    """Measures a run's newest checkpoint: nats/token of text, or accuracy and margins of pairs."""
    result = evaluate(build(config), merged)
    print(dumps(result) if json else format_result(result))


def evaluate(work: Workload, merged: bool = False) -> dict[str, Any]:
    """Held-out means of the newest checkpoint of a run; also written to its evaluation.json.

    Args:
        work: the run's.
        merged: measure its adapters merged as well, as an export has them: where the base was
            quantised, that is not quite the model that was trained. The divergence is
            KL(trained || merged), nats a held-out target.

    Raises:
        UserError: the run has no checkpoint, is of another config, or has nothing to merge.
    """
    config = work.config
    if merged and not config.lora.rank:
        raise UserError(f"--merged: {config.folder} has no adapters")
    free = ("workdir", "data.", "train.", "optim.", "exam", "mesh.", "log.", "checkpoint.")
    check_same_run(config, (*free, "tokenizer.train_vocab_size"))
    tokenizer = read_tokenizer(config.folder / "model", config.tokenizer.end_of_text)
    check_vocabulary(config, tokenizer, work.network.shape)
    prepared = prepare(config, tokenizer)
    heldout = open_records(prepared.heldout)
    if heldout.fingerprint != read_fingerprints(config.folder).get("the held-out data"):
        logging.warning(
            "%s: measured on %s, which is not the held-out data of the run itself",
            config.folder,
            heldout.directory,
        )
    general = open_records(prepared.general) if prepared.general else None
    # A merged model has no adapters to leave away: what both are compared with is stored.
    config = replace(config, rpo=replace(config.rpo, reference="stored"))
    work = make_workload(config, work.network, work.mesh)
    with jax.set_mesh(work.mesh):
        abstract = abstract_weights(work.network, work.mesh)
        step, params = load_run(config.folder, work.network, work.mesh)
        _, frozen = split_params(params)

        def first() -> Params:
            trained = first_trained(config, work.network, work.mesh, frozen)
            return join_params(trained, frozen)

        (reference,) = find_references(work, config.folder, [heldout], step, params, first)
        means = make_evaluate(work, abstract, heldout, reference, general)(params)
        result = {
            "run": str(config.folder),
            "step": step,
            "data": heldout.fingerprint,
            "heldout": means,
        }
        if merged:
            plain = abstract_weights(work.network.base, work.mesh)
            _, whole = load_params(config.folder, plain, step)
            bare = make_workload(config, work.network.base, work.mesh)
            result["merged"] = make_evaluate(bare, plain, heldout, reference, general)(whole)
            result["divergence"] = measure_divergence(work, heldout, params, whole)
    if jax.process_index() == 0:
        write_json(config.folder / "evaluation.json", result)
    return result


def format_result(result: dict[str, Any]) -> str:
    """The result as a table for the terminal."""
    columns = {"value": result["heldout"]}
    if "merged" in result:
        columns = {"trained": result["heldout"], "merged": result["merged"]}
    lines = [f"{result['run']}, step {result['step']}", "", *format_measures("held out", columns)]
    if "divergence" in result:
        lines.append(f"KL(trained || merged) {result['divergence']:.3g} nats/token")
    return "\n".join(lines)


def score_files(
    exam: Exam, directory: str, years: tuple[int, ...], files: list[str]
) -> dict[str, Any]:
    """The scores of answers in files; see `exams.scoring.score`.

    Raises:
        UserError: the exam or the files are missing, broken, or do not fit each other.
    """
    find_files(files, (".jsonl",), "--score")  # before the exam is looked for
    questions = exam.read(exam.find(directory), years or exam.years or None)
    marks = mark_all(exam, questions, read_responses(files, questions))
    asked = sorted({question.year or 0 for question in questions})
    return {"exam": exam.name, "years": asked, "files": files, **score(exam, marks)}


def parse_plan(argv: list[str]) -> Plan:
    """How a command line wants an exam to be taken."""
    return _make_plan(_parse(argv))


def _make_plan(args: argparse.Namespace) -> Plan:
    exam = find_exam(args.exam)
    return Plan(
        exam,
        directory=args.exam_dir,
        years=args.years,
        limit=args.limit,
        modes=args.modes,
        shots=exam.shots if args.shots is None else args.shots,
        seeds=args.seeds,
        drawing=Drawing(
            {ANSWER_ONLY: args.answer_tokens, EXPLAIN_FIRST: args.explain_tokens},
            args.temperature,
            args.top_k,
            args.top_p,
            tuple(args.stop),
        ),
        weigh=args.likelihood,
        slots=args.slots,
        chat=args.chat,
        step=args.step,
        mesh=args.mesh,
        dtype=args.dtype,
        out=args.out,
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m rpo_jax.evaluate", description=__doc__, fromfile_prefix_chars="@"
    )
    what = parser.add_argument_group("what is measured (one of these)")
    what.add_argument(
        "--config", metavar="FILE.py", help="a run, on held-out data; with --help: its flags"
    )
    what.add_argument("--checkpoint", metavar="FOLDER", help="a model, by an exam")
    what.add_argument("--score", metavar="FILE", nargs="+", help="answers, .jsonl; globs")
    what.add_argument("--report", metavar="FOLDER", nargs="+", help="sittings that were made")
    what.add_argument("--step", type=int, help="of --checkpoint; default: its newest")
    exam = parser.add_argument_group("the exam")
    exam.add_argument("--exam", default="igakuqa", help=f"one of {', '.join(list_exams())}")
    exam.add_argument("--exam_dir", default="", metavar="DIR", help="folder of its years")
    exam.add_argument(
        "--year", "--years", dest="years", type=_numbers, default=(), help="like 2021,2022"
    )
    exam.add_argument("--limit", type=_count, default=0, help="so many questions, evenly spread")
    how = parser.add_argument_group("how a model is asked")
    how.add_argument("--modes", type=_modes, default=MODES, help=f"default: {','.join(MODES)}")
    how.add_argument("--shots", type=_count, help="demonstrations, 3 or 0; default: the exam's")
    how.add_argument(
        "--chat",
        default="auto",
        choices=CHAT_CHOICES,
        help="by the model's chat template; default: if its end of text ends the template's turns",
    )
    how.add_argument("--seeds", type=_numbers, default=(0,), help="like 0,1,2; default: 0")
    how.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest")
    how.add_argument("--top_k", type=_count, default=0, help="default: 0, all tokens")
    how.add_argument("--top_p", type=float, default=1.0, help="default: 1, all tokens")
    how.add_argument("--answer_tokens", type=_count, default=32, help="at most; default: 32")
    how.add_argument("--explain_tokens", type=_count, default=512, help="at most; default: 512")
    how.add_argument(
        "--stop",
        nargs="*",
        type=lambda text: text.replace("\\n", "\n"),
        default=[NEXT_QUESTION],
        help="texts that end an answer, which then counts as run on; default: \\n問題:",
    )
    how.add_argument(
        "--likelihood",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also take the likeliest letter where one is wanted",
    )
    where = parser.add_argument_group("where and with what")
    where.add_argument(
        "--out",
        default="",
        metavar="FOLDER",
        help="of the sitting, default: in the model's folder; of a --report, default: the first's",
    )
    where.add_argument("--slots", type=_count, default=16, help="answers at a time; default: 16")
    where.add_argument(
        "--mesh",
        type=_mesh,
        default=MeshConfig(data=1, fsdp=-1),
        help="devices an axis, like data=2,tensor=4; default: fsdp=-1",
    )
    where.add_argument(
        "--share",
        default="",
        help="of several hosts with the same command and a common --out, this one's: 0/4, 1/4, ...",
    )
    where.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the weights; default: %(default)s",
    )
    where.add_argument("--json", action="store_true", help="print one line of JSON, and no table")
    args = parser.parse_args(argv)
    names = ("config", "checkpoint", "score", "report")
    given = [f"--{name}" for name in names if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given; one of them alone is wanted")
    if not given:
        raise UserError(
            "one of --config FILE.py, --checkpoint FOLDER, --score FILE and --report FOLDER is "
            "wanted; --help tells more"
        )
    return args


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers like 1,2 are wanted") from error


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a count is wanted")
    return int(text)


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if not set(modes) <= set(MODES):
        raise argparse.ArgumentTypeError(f"{text!r}: of {', '.join(MODES)}, by commas")
    return modes


def _mesh(text: str) -> MeshConfig:
    try:
        axes = dict(part.split("=") for part in text.split(","))
        return MeshConfig(**{"data": 1, **{axis: int(size) for axis, size in axes.items()}})
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: axes like data=2,fsdp=4 are wanted") from error


if __name__ == "__main__":
    with cli.exit_on_error():
        main(sys.argv[1:])
