"""The report of one or several sittings, made from the answers on disk and nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpo_jax.errors import UserError
from rpo_jax.exams.asking import (
    ANSWER_ONLY,
    EXPLAIN_FIRST,
    Sitting,
    choose_questions,
    describe_settings,
    digest_questions,
    find_prompt,
    list_answers,
    read_answers,
    read_sitting,
)
from rpo_jax.exams.exam import Exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.page import render_page
from rpo_jax.exams.scoring import RULES, Mark, mark_all, score, tally
from rpo_jax.exams.statistics import compare, measure_agreement, spread, vote
from rpo_jax.writing import write_whole

_SHOWN_FLIPS = 12  # texts of a model in the report


def write_report(
    exam: Exam, folders: Sequence[Path], directory: str = "", out: str = ""
) -> dict[str, Any]:
    """Builds the report of sittings and writes it as .json and .html, see `place_report`.

    Raises:
        UserError: a folder holds no sitting, or an unfinished one, or one of another exam; or the
            exam is not what it was.
    """
    report = build_report(exam, folders, directory)
    text = json.dumps(report, ensure_ascii=False, indent=1)
    place = place_report(folders, out)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place.with_name(f"{place.name}.json"), text + "\n")
    write_whole(place.with_name(f"{place.name}.html"), render_page(report))
    return report


def place_report(folders: Sequence[Path], out: str = "") -> Path:
    """Where a report goes, without its suffix: by default into the first sitting's folder.

    That of several sittings is called otherwise than that of one, which stays.
    """
    return (Path(out) if out else folders[0]) / ("report" if len(folders) == 1 else "comparison")


def build_report(exam: Exam, folders: Sequence[Path], directory: str = "") -> dict[str, Any]:
    """The report as plain data; see `write_report`.

    Each later model is compared with the first, mode by mode, where both were asked in it.
    """
    sittings = [read_sitting(folder) for folder in folders]
    first = sittings[0]
    for folder, sitting in zip(folders, sittings, strict=True):
        if sitting.exam != exam.name:
            raise UserError(f"{folder}: a sitting of --exam {sitting.exam}, not of {exam.name}")
        if (sitting.questions, sitting.asked) != (first.questions, first.asked):
            raise UserError(
                f"{folder}: other questions than {folders[0]} ({sitting.asked} of "
                f"{sitting.years}, {first.asked} of {first.years}); compare the same ones"
            )
    place = Path(directory or first.exam_dir)
    everything = exam.read(place, first.years)
    questions = choose_questions(everything, first.asked)
    if digest_questions(questions, exam.demonstrate(place)) != first.questions:
        raise UserError(
            f"{place}: the exam changed since it was asked; --exam_dir names a copy as it was"
        )
    whole = len(questions) == len(everything)
    total = sum(question.points for question in questions)
    marks = [mark_sitting(exam, folder, questions) for folder in folders]
    models = [
        _report_model(exam, folder, sitting, found)
        for folder, sitting, found in zip(folders, sittings, marks, strict=True)
    ]
    return {
        "exam": exam.name,
        "title": exam.title,
        "years": list(first.years),
        "questions": {"asked": len(questions), "of": len(everything), "points": total},
        "models": models,
        "comparisons": [
            {
                "model": model["name"],
                "against": models[0]["name"],
                "mode": mode,
                **compare(list(marks[0][mode].values()), list(by_seed.values()), "extracted"),
            }
            for model, found in zip(models[1:], marks[1:], strict=True)
            for mode, by_seed in found.items()
            if mode in marks[0]
        ],
        "published": find_published(exam, first.years) if whole else {},
    }


def mark_sitting(
    exam: Exam, folder: Path, questions: Sequence[Question]
) -> dict[str, dict[int, list[Mark]]]:
    """The marks of a finished sitting by mode and seed, in the order of the questions.

    Raises:
        UserError: answers are missing.
    """
    marks: dict[str, dict[int, list[Mark]]] = {}
    for mode, seed in list_answers(folder):
        answers = {response.id: response for response in read_answers(folder, mode, seed)}
        missing = [question.id for question in questions if question.id not in answers]
        if missing:
            raise UserError(
                f"{folder}: {mode}, seed {seed}: {len(missing)} of {len(questions)} questions have "
                "no answer yet; the command that asked them goes on when it is run again"
            )
        marks.setdefault(mode, {})[seed] = mark_all(
            exam, questions, [answers[q.id] for q in questions]
        )
    if not marks:
        raise UserError(f"{folder}: nothing was asked yet")
    if lacking := [mode for mode in read_sitting(folder).modes if mode not in marks]:
        raise UserError(
            f"{folder}: {' and '.join(lacking)} has no answers yet; the command that asked them "
            "goes on when it is run again"
        )
    return marks


def _report_model(
    exam: Exam, folder: Path, sitting: Sitting, marks: dict[str, dict[int, list[Mark]]]
) -> dict[str, Any]:
    likelihood = folder / "likelihood.json"
    model: dict[str, Any] = {
        "name": Path(sitting.model).name,
        "folder": str(folder),
        "settings": describe_settings(sitting),
        "modes": {
            mode: _report_mode(exam, sitting, mode, by_seed) for mode, by_seed in marks.items()
        },
        "likelihood": json.loads(likelihood.read_text()) if likelihood.exists() else None,
        "comparison": None,
        "flips": [],
    }
    if ANSWER_ONLY in marks and EXPLAIN_FIRST in marks:
        short, long = marks[ANSWER_ONLY], marks[EXPLAIN_FIRST]
        model["comparison"] = compare(list(short.values()), list(long.values()), "extracted")
        model["flips"] = _show_flips(next(iter(short.values())), next(iter(long.values())))
    return model


def _report_mode(
    exam: Exam, sitting: Sitting, mode: str, by_seed: dict[int, list[Mark]]
) -> dict[str, Any]:
    seeds = list(by_seed.values())
    return {
        "prompt": find_prompt(exam, mode, sitting.shots, bool(sitting.chat)).name,
        "points": {rule: spread([tally(m, rule)["points"] for m in seeds]) for rule in RULES},
        "agreement": measure_agreement(seeds),
        "vote": tally(vote(exam, seeds), "extracted") if len(seeds) > 1 else None,
        "seeds": {str(seed): score(exam, marks) for seed, marks in by_seed.items()},
    }


def _show_flips(short: Sequence[Mark], long: Sequence[Mark]) -> list[dict[str, Any]]:
    """The first questions that explaining lost, then gained, with what was written."""
    pairs = list(zip(short, long, strict=True))
    lost = [pair for pair in pairs if pair[0].extracted and not pair[1].extracted]
    gained = [pair for pair in pairs if not pair[0].extracted and pair[1].extracted]
    return [
        {
            "id": one.question.id,
            "kind": kind,
            "gold": ",".join(one.question.answers),
            ANSWER_ONLY: {"answer": ",".join(one.extraction.answer), "text": one.response.text},
            EXPLAIN_FIRST: {"answer": ",".join(two.extraction.answer), "text": two.response.text},
        }
        for kind, found in (("lost", lost), ("gained", gained))
        for one, two in found[: _SHOWN_FLIPS // 2]
    ]


def find_published(exam: Exam, years: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Points that others reported on all of these years, by model."""
    return {
        model: {
            "years": {str(y): points[y] for y in years},
            "points": sum(points[y] for y in years),
        }
        for model, points in exam.published.items()
        if set(years) <= set(points)
    }
