"""Marks and scores: the published rule to the letter, and answers read out of free text."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpo_jax.exams.exam import Exam
from rpo_jax.exams.extraction import Extraction, extract, question_slots
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.numbers import same_number
from rpo_jax.exams.responses import Response

RULES = ("official", "extracted")


@dataclass(frozen=True)
class Mark:
    """One response, marked by both rules."""

    question: Question
    response: Response
    extraction: Extraction
    official: bool
    extracted: bool


def is_officially_right(exam: Exam, question: Question, prediction: str) -> bool:
    """The published rule on a prediction string, letter for letter.

    The parts between commas, sorted, are the gold letters, sorted: no part marks, nothing stripped,
    numbers as strings. A gold "a or d" takes either; some ids are right whatever is said.

    Source: arXiv:2303.18027's evaluation code.
    """
    said = sorted(prediction.split(","))
    accepted = (question.answers, *question.accepted)
    return question.id in exam.always_right or any(said == sorted(gold) for gold in accepted)


def is_right(exam: Exam, question: Question, answer: Sequence[str]) -> bool:
    """Whether an extracted answer is right: the same golds, as sets of letters or as numbers."""
    if question.id in exam.always_right:
        return True
    if not answer:
        return False
    if question.is_numeric:
        slots = question_slots(question)
        return any(same_number(answer[0], gold[0], slots) for gold in question.accepted)
    return any(set(answer) == set(gold) for gold in question.accepted)


def mark(exam: Exam, question: Question, response: Response) -> Mark:
    """Marks a response by both rules."""
    extraction = extract(question, response.text)
    prediction = response.text if response.prediction is None else response.prediction
    return Mark(
        question,
        response,
        extraction,
        is_officially_right(exam, question, prediction),
        is_right(exam, question, extraction.answer),
    )


def mark_all(
    exam: Exam, questions: Sequence[Question], responses: Sequence[Response]
) -> list[Mark]:
    """Marks one response to each question."""
    return [mark(exam, q, r) for q, r in zip(questions, responses, strict=True)]


GROUPS: Mapping[str, Callable[[Question], str]] = {
    "year": lambda question: str(question.year),
    "section": lambda question: question.section,
    "category": lambda question: question.category or "(none)",
    "answers": lambda question: "number" if question.is_numeric else str(len(question.answers)),
    "text_only": lambda question: "text only" if question.text_only else "with a figure",
}


def score(exam: Exam, marks: Sequence[Mark]) -> dict[str, Any]:
    """Points, questions, groups, pass or fail a year, rates and lengths; ready for JSON."""
    return {
        **{rule: tally(marks, rule) for rule in RULES},
        "rates": measure_rates(marks),
        "lengths": measure_lengths(marks),
        "pass": {year: judge(exam, group) for year, group in split(marks, "year").items()},
        "by": {
            name: {
                value: {rule: tally(group, rule) for rule in RULES}
                for value, group in split(marks, name).items()
            }
            for name in GROUPS
        },
    }


def tally(marks: Iterable[Mark], rule: str) -> dict[str, float]:
    """Points reached and possible, questions right and asked, and both shares."""
    return _tally((one.question.points, getattr(one, rule)) for one in marks)


def tally_answers(
    exam: Exam, questions: Sequence[Question], answers: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """The same of answers by question id that were not read out of a text."""
    return _tally((q.points, is_right(exam, q, answers[q.id])) for q in questions)


def _tally(pairs: Iterable[tuple[int, bool]]) -> dict[str, float]:
    rows = list(pairs)
    points = sum(worth for worth, right in rows if right)
    total = sum(worth for worth, _ in rows)
    right = sum(right for _, right in rows)
    return {
        "points": points,
        "total": total,
        "share": points / total if total else 0.0,
        "right": right,
        "questions": len(rows),
        "accuracy": right / len(rows) if rows else 0.0,
    }


def split(marks: Iterable[Mark], group: str) -> dict[str, list[Mark]]:
    """The marks by what their questions have in common, in the order of the names."""
    found: dict[str, list[Mark]] = {}
    for one in marks:
        found.setdefault(GROUPS[group](one.question), []).append(one)
    return dict(sorted(found.items()))


def judge(exam: Exam, marks: Sequence[Mark]) -> dict[str, Any]:
    """The exam's own verdict on one year, by the extracted answers.

    ``passed`` is None where a rule is not known for that year. Points that only part of the
    questions were asked for mean nothing here: the caller asks whole years, or says so.
    """
    verdict: dict[str, Any] = {}
    if exam.required_sections:
        inside = [m for m in marks if m.question.section in exam.required_sections]
        outside = [m for m in marks if m.question.section not in exam.required_sections]
        required, general = tally(inside, "extracted"), tally(outside, "extracted")
        wanted = exam.general_pass.get(marks[0].question.year or 0)
        verdict["required"] = {
            **required,
            "pass_share": exam.required_share,
            "passed": required["points"] >= exam.required_share * required["total"],
        }
        verdict["general"] = {
            **general,
            "pass_points": wanted,
            "passed": None if wanted is None else general["points"] >= wanted,
        }
    if exam.prohibited_from:
        chosen = [m.question.id for m in marks if chose_prohibited(m)]
        verdict["prohibited"] = {
            "chosen": len(chosen),
            "ids": chosen,
            "fails_from": exam.prohibited_from,
            "passed": len(chosen) < exam.prohibited_from,
        }
    parts = [part["passed"] for part in verdict.values()]
    verdict["passed"] = False if False in parts else (None if None in parts or not parts else True)
    return verdict


def chose_prohibited(one: Mark) -> bool:
    """Whether an answer holds a choice that the exam prohibits."""
    return bool(set(one.extraction.answer) & set(one.question.kinki))


def measure_rates(marks: Sequence[Mark]) -> dict[str, Any]:
    """How often there was an answer, how it was found, and how the texts ended.

    ``stop`` is by the model itself, with its end of text. A text that had to be stopped where it
    began another question is run on. What is not known is None.
    """
    count = max(len(marks), 1)
    told = [m.response.stop_reason for m in marks if m.response.stop_reason]

    def share(predicate: Callable[[Mark], bool]) -> float:
        return sum(map(predicate, marks)) / count

    return {
        "parse": share(lambda m: bool(m.extraction.answer)),
        "went_on": share(lambda m: m.extraction.went_on),
        "run_on": share(lambda m: m.extraction.run_on or m.response.stop_reason == "stop"),
        "stop": sum(reason == "eos" for reason in told) / len(told) if told else None,
        "truncation": sum(reason == "length" for reason in told) / len(told) if told else None,
        "found": dict(sorted(Counter(m.extraction.found for m in marks).items())),
    }


def measure_lengths(marks: Sequence[Mark]) -> dict[str, Any]:
    """Lengths of the texts, in characters, and in tokens where they were counted."""
    return {
        "characters": _spread([len(m.response.text) for m in marks]),
        "tokens": _spread([m.response.tokens for m in marks if m.response.tokens]),
    }


def _spread(lengths: Sequence[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    return {
        "mean": statistics.fmean(lengths),
        "median": statistics.median(lengths),
        "longest": max(lengths),
    }
