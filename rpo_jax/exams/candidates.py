"""Judged answers: what pairs are made of, drawn here or elsewhere.

A set of candidates is a folder, whole or not there: `candidates.jsonl`, a line an answer with its
score, and `candidates.json`, which tells what they are of, with the ledger.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo_jax.data.files import find_files, read_objects, take_string
from rpo_jax.data.ledger import Ledger
from rpo_jax.errors import UserError
from rpo_jax.exams.asking import EXPLAIN_FIRST, MODES
from rpo_jax.exams.exam import Exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.responses import Response, parse_response
from rpo_jax.exams.scoring import mark

_CUE = re.compile(r"\A(?:\s*考察\s*[:：]\s*)+")  # what the prompt ends with, said once more
CANDIDATES_FILE, CANDIDATES_NOTE = "candidates.jsonl", "candidates.json"
RIGHT, WRONG, UNCLEAR = "right", "wrong", "unclear"


@dataclass(frozen=True)
class Candidate:
    """An answer to a question, judged by the exam's key.

    Attributes:
        question: its id.
        mode: how it was asked.
        key: tells the answers of a question and mode apart: the seed, or file and line.
        text: as it was written.
        answer: letters (or one number) that the text gives; empty: none.
        verdict: ``right``, ``wrong``, or ``unclear`` where it gives no answer.
        found: how the answer was found, or why there is none; see `exams.extraction`.
        went_on: whether anything follows the answer.
        stop_reason: ``eos``, ``stop`` or ``length``; "" where not known.
        tokens: written; 0 where not known.
    """

    question: str
    mode: str
    key: str
    text: str
    answer: tuple[str, ...]
    verdict: str
    found: str
    went_on: bool
    stop_reason: str = ""
    tokens: int = 0


def strip_cue(text: str) -> str:
    """A text that goes on behind a prompt which explains, without the prompt's own cue."""
    return _CUE.sub("", text)


def judge(exam: Exam, question: Question, mode: str, key: str, response: Response) -> Candidate:
    """The response with what the exam's key says of it."""
    one = mark(exam, question, response)
    verdict = UNCLEAR if not one.extraction.answer else RIGHT if one.extracted else WRONG
    return Candidate(
        question.id,
        mode,
        key,
        response.text,
        one.extraction.answer,
        verdict,
        one.extraction.found,
        one.extraction.went_on,
        response.stop_reason,
        response.tokens,
    )


def read_foreign(
    patterns: Sequence[str],
    questions: Mapping[str, Question],
    modes: Sequence[str],
    exam: Exam,
    ledger: Ledger,
) -> Iterator[Candidate]:
    """Answers made elsewhere, judged: lines as `exams.responses` knows them, any number a question.

    A line may say its ``mode``; it has to where `modes` are two. A text goes on behind the prompt:
    a cue of the prompt's that it begins with is taken off, or pairs would be told apart by it.

    Raises:
        UserError: with file and line, what is missing, mistyped or unknown.
    """
    for path in find_files(patterns, (".jsonl",), "data.sample.files"):
        for number, (where, record) in enumerate(read_objects(path), start=1):
            mode = take_string(where, record, "mode") if "mode" in record else modes[0]
            if mode not in MODES or ("mode" not in record and len(modes) > 1):
                raise UserError(
                    f"{where}: field 'mode' is {record.get('mode')!r}; {' or '.join(MODES)} is "
                    "wanted (or data.sample.modes with that one alone)"
                )
            response = parse_response(where, record)
            if mode == EXPLAIN_FIRST:
                response = dataclasses.replace(response, text=strip_cue(response.text))
            if mode not in modes:
                ledger.drop(f"{mode} is not in data.sample.modes", where)
            elif response.id not in questions:
                ledger.drop("of a question that is not trained on", f"{response.id}, {where}")
            else:
                yield judge(exam, questions[response.id], mode, f"{path.stem}:{number}", response)


def write_candidates(folder: Path, candidates: Iterable[Candidate]) -> None:
    """Writes `candidates.jsonl` into a folder."""
    with (folder / CANDIDATES_FILE).open("w", encoding="utf-8") as file:
        for candidate in candidates:
            file.write(json.dumps(dataclasses.asdict(candidate), ensure_ascii=False) + "\n")


def read_candidates(folder: Path) -> Iterator[Candidate]:
    """What `write_candidates` wrote.

    Raises:
        UserError: it is damaged.
    """
    path = folder / CANDIDATES_FILE
    for where, record in read_objects(path):
        try:
            yield Candidate(**{**record, "answer": tuple(record["answer"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"{where}: damaged ({error}); delete {folder}") from error


def summarise(candidates: Sequence[Candidate], questions: int) -> dict[str, dict[str, Any]]:
    """By mode: how many answers of which verdict, how they ended, and which questions have what."""
    found = {}
    for mode in MODES:
        own = [candidate for candidate in candidates if candidate.mode == mode]
        if not own:
            continue
        having = {
            verdict: {c.question for c in own if c.verdict == verdict} for verdict in (RIGHT, WRONG)
        }
        told = [candidate for candidate in own if candidate.stop_reason]
        found[mode] = {
            "answers": len(own),
            **{v: sum(c.verdict == v for c in own) / len(own) for v in (RIGHT, WRONG, UNCLEAR)},
            "stop": sum(c.stop_reason == "eos" for c in told) / len(told) if told else None,
            "questions": questions,
            "with_right": len(having[RIGHT]),
            "with_wrong": len(having[WRONG]),
            "with_both": len(having[RIGHT] & having[WRONG]),
        }
    return found
