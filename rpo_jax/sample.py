"""Answers for preference pairs: `python -m rpo_jax.sample --config configs/<name>.py`.

The model in `init_from` answers every training question of the exam in `data.sample` several times;
answers made elsewhere are taken too; all are judged by the exam's key. What pairs are then made of
lies in a set of candidates. Several hosts share the work, each with the same command and a part:
`--share 0/4`, `--share 1/4`, ... in a `workdir` that all of them see.
"""

import json
import logging
from pathlib import Path

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.data.files import check_sums, digest_files, find_files, sum_files
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.records import digest
from rpo_jax.errors import UserError
from rpo_jax.examine import Paper, Plan, ask_paper, open_paper
from rpo_jax.exams.asking import (
    ANSWER_ONLY,
    EXPLAIN_FIRST,
    Drawing,
    Share,
    digest_questions,
    parse_share,
    read_answers,
)
from rpo_jax.exams.candidates import (
    CANDIDATES_FILE,
    CANDIDATES_NOTE,
    Candidate,
    judge,
    read_foreign,
    summarise,
    write_candidates,
)
from rpo_jax.exams.responses import Response
from rpo_jax.exams.split import Split, split_exam
from rpo_jax.training.checkpoint import find_step, open_existing
from rpo_jax.training.opening import open_model, take_apart
from rpo_jax.training.origin import fingerprint_checkpoint
from rpo_jax.writing import draft_folder, write_json

_FORMAT = 3  # raised when candidates change their meaning: older sets are then made anew


def main(config: Config, share: str = "") -> None:
    """Draws answers of the model in init_from, judges them by the exam's key, and stores all."""
    split = split_exam(config)
    draw(config, split, parse_share(share))
    there, wanted = count_drawn(config, split)
    if share and there < wanted:
        print(f"{there:,} of {wanted:,} answers are drawn; the others come from the other shares")
    else:
        print(describe(gather(config, split)))


def draw(config: Config, split: Split, share: Share | None = None) -> None:
    """Asks what was not asked yet; nothing where all of it was.

    Args:
        config: of a run with data.source=candidates.
        split: of its exam.
        share: of the work that is done here; default: all.

    Raises:
        UserError: the model is missing or broken, or cannot be asked.
    """
    _check_source(config)
    if not config.data.sample.answers:
        return
    plan, paper, sitting = _plan(config, split), _paper(split), find_sitting(config, split)
    asks = paper.list_asks(plan)
    answers = _read_drawn(config, sitting)
    own = (share or Share()).take(asks)
    left = [ask for ask in own if ask.question.id not in answers[ask.mode, ask.seed]]
    if not left:
        logging.info("%s: all %d answers are there", sitting, len(own))
        return
    assert config.origin is not None, "resolve() wants an origin for stage=rpo"
    model = open_model(config.origin, config.mesh, config.model.compute_dtype)
    phrasing = open_paper(model, plan, paper, sitting)
    ask_paper(take_apart(model), phrasing, plan, paper, sitting, share)


def gather(config: Config, split: Split) -> Path:
    """The folder of the judged answers of a run; made where it is not there yet.

    Raises:
        UserError: answers are still to be drawn, or a file with answers is missing or broken.
    """
    _check_source(config)
    options = config.data.sample
    files = digest_files(find_files(options.files, (".jsonl",), "data.sample.files"))
    sitting = find_sitting(config, split) if options.answers else None
    identity = {
        "format": _FORMAT,
        "exam": split.exam.name,
        "questions": digest_questions(split.taught, split.demonstrations),
        "sitting": sitting.name if sitting else "",
        "seeds": list(_seeds(config)),
        "modes": list(options.modes),
        "files": [file["sha256"] for file in files],
    }
    fingerprint = digest(identity)
    folder = Path(config.workdir) / "data" / f"candidates-{fingerprint[:16]}"
    if folder.is_dir():
        check_sums(folder, CANDIDATES_NOTE)
        return folder
    ledger = Ledger("answers")
    questions = {question.id: question for question in split.taught}
    candidates = [] if sitting is None else _judge_drawn(config, split, sitting)
    candidates += read_foreign(options.files, questions, options.modes, split.exam, ledger)
    order = {id_: place for place, id_ in enumerate(questions)}
    candidates.sort(key=lambda one: (order[one.question], one.mode))  # and as they were read
    ledger.kept = len(candidates)
    if not candidates:
        raise UserError(f"data.sample.files: no answer to a question that is trained on\n{ledger}")
    with draft_folder(folder) as draft:
        write_candidates(draft, candidates)
        info = {
            **identity,
            "fingerprint": fingerprint,
            "sha256": sum_files(draft, [CANDIDATES_FILE]),
            "model": str(config.origin) if sitting else "",
            "answers_of": str(sitting) if sitting else "",
            "files": files,
            "ledger": ledger.to_dict(),
            "summary": summarise(candidates, len(questions)),
        }
        write_json(draft / CANDIDATES_NOTE, info)
    return folder


def count_drawn(config: Config, split: Split) -> tuple[int, int]:
    """How many answers a model has given, and how many are wanted of it."""
    if not config.data.sample.answers:
        return 0, 0
    drawn = _read_drawn(config, find_sitting(config, split))
    return sum(map(len, drawn.values())), len(drawn) * len(split.taught)


def find_sitting(config: Config, split: Split) -> Path:
    """Where the drawn answers of a model lie; the name follows from all that they depend on.

    Raises:
        UserError: there is no model in init_from.
    """
    assert config.origin is not None, "resolve() wants an origin for stage=rpo"
    plan = _plan(config, split)
    with open_existing(config.origin) as checkpoints:
        step = find_step(checkpoints, None)
    identity = {
        "checkpoint": fingerprint_checkpoint(config.origin, step),
        "questions": digest_questions(split.taught, split.demonstrations),
        "shots": plan.shots,
        "dtype": plan.dtype,
        "drawing": json.dumps(plan.drawing.__dict__, default=dict),
    }
    return config.origin / "samples" / f"{split.exam.name}-{step}-{digest(identity)[:8]}"


def describe(folder: Path) -> str:
    """What is in a set of candidates, in words."""
    info = json.loads((folder / CANDIDATES_NOTE).read_text(encoding="utf-8"))
    lines = [f"{folder}: {Ledger.from_dict(info['ledger'])}"]
    for mode, found in info["summary"].items():
        stop = "" if found["stop"] is None else f", {found['stop']:.1%} ended by themselves"
        lines.append(
            f"{mode}: {found['answers']:,} answers to {found['questions']:,} questions: "
            f"{found['right']:.1%} right, {found['wrong']:.1%} wrong, {found['unclear']:.1%} "
            f"without an answer{stop}\n"
            f"  questions with a right one {found['with_right']:,}, with a wrong one "
            f"{found['with_wrong']:,}, with both {found['with_both']:,}"
        )
    return "\n".join(lines)


def _plan(config: Config, split: Split) -> Plan:
    options = config.data.sample
    return Plan(
        split.exam,
        modes=options.modes,
        shots=options.shots,
        seeds=_seeds(config),
        drawing=Drawing(
            {ANSWER_ONLY: options.answer_tokens, EXPLAIN_FIRST: options.explain_tokens},
            options.temperature,
            options.top_k,
            options.top_p,
        ),
        slots=options.slots,
        chat="no",  # the prompts of pairs are plain text
    )


def _paper(split: Split) -> Paper:
    return Paper(split.directory, split.taught, split.demonstrations)


def _seeds(config: Config) -> tuple[int, ...]:
    first = config.data.sample.first_seed
    return tuple(range(first, first + config.data.sample.answers))


def _read_drawn(config: Config, sitting: Path) -> dict[tuple[str, int], dict[str, Response]]:
    return {
        (mode, seed): {response.id: response for response in read_answers(sitting, mode, seed)}
        for mode in config.data.sample.modes
        for seed in _seeds(config)
    }


def _judge_drawn(config: Config, split: Split, sitting: Path) -> list[Candidate]:
    """The drawn answers, judged, by seed.

    Raises:
        UserError: some were not drawn yet.
    """
    drawn = _read_drawn(config, sitting)
    there, wanted = count_drawn(config, split)
    if there < wanted:
        raise UserError(
            f"{sitting}: {there:,} of {wanted:,} answers are drawn; the others come from "
            "`python -m rpo_jax.sample` with this config (with --share: from those of the others)"
        )
    return [
        judge(split.exam, question, mode, str(seed), answers[question.id])
        for (mode, seed), answers in drawn.items()
        for question in split.taught
    ]


def _check_source(config: Config) -> None:
    if config.data.source != "candidates":
        raise UserError(
            f"data.source={config.data.source!r}: answers are sampled and paired where it is "
            "'candidates'"
        )


if __name__ == "__main__":
    cli.run(
        main,
        options={"share": "part of the work that this host does: 0/4, 1/4, ...; default: all"},
        examples=(
            "--config configs/fictional_pairs.py",
            "--config configs/fictional_pairs.py --config.data.sample.answers=16",
        ),
    )
