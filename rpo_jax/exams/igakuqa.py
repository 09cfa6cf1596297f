"""Read and write exams in the IgakuQA file format.

Layout: ``{year}/{number}-{section}.jsonl`` with the questions, an optional
``{number}-{section}_metadata.jsonl`` beside it, and ``prompt.jsonl`` with the demonstrations, which
the release has outside its ``data`` folder.

Source: arXiv:2303.18027 and its data release (github jungokasai/IgakuQA).
"""

import json
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo_jax.errors import UserError
from rpo_jax.writing import write_whole

DEMONSTRATIONS_FILE = "prompt.jsonl"
_RELEASED = Path("scripts") / "prompts" / DEMONSTRATIONS_FILE  # beside data, in a clone
FIRST_EXAM_YEAR = 1906  # exam 112 was held in 2018, and so on

_QUESTION_KEYS = ("problem_id", "problem_text", "choices", "text_only", "answer")
_METADATA_KEYS = ("category", "kinki", "reason", "human_accuracy", "breakdown")
_FILE_NAME = re.compile(r"(\d+)-([A-Z])\.jsonl")
_QUESTION_ID = re.compile(r"(\d+)([A-Z])(\d+)")
_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Question:
    """One exam question.

    Attributes:
        id: Exam number, section, index: ``112A1``.
        choices: Choice texts without their letters; empty for a numeric question.
        answers: Gold exactly as published: letters, or one digit string for a numeric question
            (where the release sometimes lost the decimal point), or the one entry ``a or d``.
        points: 0 for a question that was withdrawn from scoring.
        text_only: False if the question refers to a figure that the data does not hold.
        year: None for a demonstration.
        kinki: Letters of prohibited choices, normalised and sorted.
    """

    id: str
    text: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]
    points: int = 1
    text_only: bool = True
    year: int | None = None
    section: str = ""
    category: str = ""
    kinki: tuple[str, ...] = ()
    explanation: str | None = None

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the choices, ``a`` first."""
        return tuple(string.ascii_lowercase[: len(self.choices)])

    @property
    def is_numeric(self) -> bool:
        """Whether the answer is a number, not letters."""
        return not self.choices

    @property
    def accepted(self) -> tuple[tuple[str, ...], ...]:
        """Every answer that counts as right; more than one only for golds like ``a or d``."""
        if len(self.answers) == 1 and " or " in self.answers[0]:
            return tuple((letter,) for letter in self.answers[0].split(" or "))
        return (self.answers,)


def read_questions(directory: str | Path, years: Iterable[int] | None = None) -> list[Question]:
    """Reads the questions of an exam in the order year, section, line.

    Args:
        directory: Holds one sub-directory a year.
        years: The years to read; None reads all that are there.

    Raises:
        UserError: The directory, a year or its question files are missing, or a line breaks the
            format; the message names file, line, field, what was seen and what is allowed.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"exam directory {root} does not exist (one folder a year in it)")
    found = sorted(int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdecimal())
    wanted = found if years is None else sorted(set(years))
    missing = [year for year in wanted if year not in found]
    if missing or not wanted:
        raise UserError(f"exam directory {root}: no folder for {missing}; it has {found}")
    questions: list[Question] = []
    first_seen: dict[str, str] = {}
    for year in wanted:
        paths = sorted(p for p in (root / str(year)).iterdir() if _FILE_NAME.fullmatch(p.name))
        if not paths:
            raise UserError(f"{root / str(year)} holds no file named like 112-A.jsonl")
        for path in paths:
            for where, question in _read_section(path, year):
                if question.id in first_seen:
                    allowed = f"an id not used before (first at {first_seen[question.id]})"
                    raise _error(where, "problem_id", question.id, allowed)
                first_seen[question.id] = where
                questions.append(question)
    return questions


def find_demonstrations(directory: str | Path) -> Path:
    """The ``prompt.jsonl`` of an exam: in its folder, or where a clone of the release has it.

    Raises:
        UserError: It is in neither place.
    """
    own = Path(directory) / DEMONSTRATIONS_FILE
    released = Path(directory) / ".." / _RELEASED
    for path in (own, released):
        if path.is_file():
            return path
    raise UserError(f"{own} does not exist, nor {released}: the exam's demonstrations are wanted")


def read_demonstrations(directory: str | Path) -> list[Question]:
    """Reads the worked examples of an exam in file order; they have no year and no points.

    Raises:
        UserError: There is no ``prompt.jsonl``, or a line breaks the format.
    """
    return [
        _parse_question(where, record, year=None)
        for where, record in _read_lines(find_demonstrations(directory))
    ]


def write_questions(
    directory: str | Path, questions: Sequence[Question], demonstrations: Sequence[Question] = ()
) -> None:
    """Writes questions (and demonstrations) so that the readers above return them unchanged.

    Each file appears whole or not at all. Metadata files hold category and kinki only: the
    human statistics of the published files have no counterpart in `Question`.

    Raises:
        ValueError: A question has no year, or its id does not match its year and section.
    """
    root = Path(directory)
    files: dict[Path, list[str]] = {}
    for question in questions:
        prefix = f"{(question.year or 0) - FIRST_EXAM_YEAR}{question.section}"
        if not question.year or not re.fullmatch(re.escape(prefix) + r"\d+", question.id):
            raise ValueError(
                f"question id {question.id!r} does not fit year {question.year} and section "
                f"{question.section!r}: expected {prefix} and a number"
            )
        stem = f"{question.year - FIRST_EXAM_YEAR}-{question.section}"
        folder = root / str(question.year)
        files.setdefault(folder / f"{stem}.jsonl", []).append(_dump(_question_record(question)))
        metadata = {
            "problem_id": question.id,
            "category": question.category,
            "kinki": list(question.kinki),
        }
        files.setdefault(folder / f"{stem}_metadata.jsonl", []).append(_dump(metadata))
    if demonstrations:
        files[root / DEMONSTRATIONS_FILE] = [
            _dump({k: v for k, v in _question_record(d).items() if k != "points"})
            for d in demonstrations
        ]
    for path, lines in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(line + "\n" for line in lines))


def _question_record(question: Question) -> dict[str, Any]:
    record: dict[str, Any] = {
        "problem_id": question.id,
        "problem_text": question.text,
        "choices": list(question.choices),
        "text_only": question.text_only,
        "answer": list(question.answers),
        "points": str(question.points),
    }
    if question.explanation is not None:
        record["explanation"] = question.explanation
    return record


def _read_section(path: Path, year: int) -> Iterator[tuple[str, Question]]:
    metadata_path = path.with_name(path.stem + "_metadata.jsonl")
    metadata = _read_metadata(metadata_path) if metadata_path.exists() else {}
    prefix = path.stem.replace("-", "")
    ids = set()
    for where, record in _read_lines(path):
        question = _parse_question(where, record, year, metadata)
        if not re.fullmatch(prefix + r"\d+", question.id):
            raise _error(where, "problem_id", question.id, f"{prefix} and a number")
        ids.add(question.id)
        yield where, question
    for unknown in sorted(set(metadata) - ids):
        raise _error(metadata[unknown][0], "problem_id", unknown, f"an id of {path.name}")


def _read_metadata(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    metadata: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, record in _read_lines(path):
        _check_keys(where, record, required=("problem_id",), optional=_METADATA_KEYS)
        question_id = _typed(where, record, "problem_id", str)
        if question_id in metadata:
            raise _error(where, "problem_id", question_id, "an id not used before in this file")
        metadata[question_id] = (where, record)
    return metadata


def _parse_question(
    where: str,
    record: dict[str, Any],
    year: int | None,
    metadata: Mapping[str, tuple[str, dict[str, Any]]] | None = None,
) -> Question:
    points_key = () if year is None else ("points",)
    _check_keys(where, record, required=_QUESTION_KEYS + points_key, optional=("explanation",))
    question_id = _typed(where, record, "problem_id", str)
    match = _QUESTION_ID.fullmatch(question_id)
    if not match:
        raise _error(where, "problem_id", question_id, "exam number, section, index, like 112A1")
    choices = _strings(where, record, "choices")
    letters = string.ascii_lowercase[: len(choices)]
    points = _typed(where, record, "points", str) if points_key else "1"
    if not re.fullmatch(r"\d{1,2}", points):
        raise _error(where, "points", points, 'a string of digits, like "1"')
    explanation = record.get("explanation")
    if explanation is not None:
        explanation = _typed(where, record, "explanation", str)
    text = _typed(where, record, "problem_text", str)
    if not text.strip():
        raise _error(where, "problem_text", text, "a text that is not empty")
    metadata_where, details = (metadata or {}).get(question_id, (where, {}))
    category = details.get("category", "")
    if not isinstance(category, str):
        raise _error(metadata_where, "category", category, "a string")
    return Question(
        id=question_id,
        text=text,
        choices=choices,
        answers=_parse_answers(where, _strings(where, record, "answer"), letters),
        points=int(points),
        text_only=_typed(where, record, "text_only", bool),
        year=year,
        section=match.group(2),
        category=category,
        kinki=_parse_kinki(metadata_where, details, letters),
        explanation=explanation,
    )


def _parse_answers(where: str, answers: tuple[str, ...], letters: str) -> tuple[str, ...]:
    if not letters:
        if len(answers) != 1 or not _NUMBER.fullmatch(answers[0]):
            raise _error(where, "answer", list(answers), "one number in digits (no choices given)")
        return answers
    # One published gold (112B30) names alternatives, not a set: "a or d".
    parts = answers[0].split(" or ") if len(answers) == 1 else list(answers)
    if not parts or len(set(parts)) < len(parts) or any(p not in tuple(letters) for p in parts):
        allowed = f"different letters of {letters[0]}-{letters[-1]} ({len(letters)} choices)"
        raise _error(where, "answer", list(answers), allowed)
    return answers


def _parse_kinki(where: str, details: dict[str, Any], letters: str) -> tuple[str, ...]:
    if "kinki" not in details:
        return ()
    entries = _strings(where, details, "kinki")
    # Published entries are mixed: "cde" for three letters, full-width letters, leading spaces.
    marked = sorted(set("".join(unicodedata.normalize("NFKC", e) for e in entries)) - {" "})
    if any(letter not in letters for letter in marked):
        raise _error(where, "kinki", list(entries), f"letters of the choices ({letters or 'none'})")
    return tuple(marked)


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:  # both broken JSON and broken UTF-8
            raise UserError(f"{where}: not a JSON line in UTF-8: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: saw {type(record).__name__}, allowed: a JSON object")
        yield where, record


def _check_keys(
    where: str, record: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    for key in record:
        if key not in required + optional:
            raise _error(where, key, "an unknown key", ", ".join(required + optional))
    for key in required:
        if key not in record:
            raise _error(where, key, "nothing", "this key is required")


def _typed(where: str, record: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(record[key], kind):
        raise _error(where, key, record[key], f"a value of type {kind.__name__}")
    return record[key]


def _strings(where: str, record: dict[str, Any], key: str) -> tuple[str, ...]:
    value = record[key]
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _error(where, key, value, "a list of strings")
    return tuple(value)


def _error(where: str, field: str, saw: object, allowed: str) -> UserError:
    return UserError(f"{where}: field {field!r}: saw {saw!r}, allowed: {allowed}")


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
