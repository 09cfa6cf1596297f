"""What models answered: JSONL files in and out.

A line is ``{"id", "text"}`` and, where we asked, how the text came about; or the line of the
published prediction files, ``{"problem_id", "prediction", "explanation"}``.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rpo_jax.data.files import find_files, read_objects, take_string
from rpo_jax.errors import UserError
from rpo_jax.exams.igakuqa import Question


@dataclass(frozen=True)
class Response:
    """An answer to one question.

    Attributes:
        id: of the question.
        text: as the model wrote it.
        prediction: what the published rule is applied to; None: the text.
        stop_reason: ``eos``, ``stop`` (a stop text) or ``length`` (cut off); "" where not known.
        tokens: written; 0 where not known.
    """

    id: str
    text: str
    prediction: str | None = None
    stop_reason: str = ""
    tokens: int = 0


def predict(text: str) -> str:
    """The prediction that the published pipeline makes of a completion.

    Spaces at its ends go, ASCII becomes half-width, and letters lower-case.

    Source: arXiv:2303.18027's code for completion models.
    """
    half = {0x3000: 0x20, **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}}
    return text.strip().translate(half).lower()


def read_responses(patterns: Sequence[str], questions: Sequence[Question]) -> list[Response]:
    """The responses of files, one to each question, in the order of the questions.

    Raises:
        UserError: a line is not JSON, lacks a field or has one of the wrong type; an id is unknown
            or comes twice; or a question has no response. File and line are named.
    """
    wanted = {question.id for question in questions}
    found: dict[str, tuple[str, Response]] = {}
    for path in find_files(patterns, (".jsonl",), "--score"):
        for where, record in read_objects(path):
            response = parse_response(where, record)
            if response.id not in wanted:
                raise UserError(
                    f"{where}: id {response.id!r} is no question that was asked for; those are "
                    f"{_name_some([q.id for q in questions])} (does --year fit the file?)"
                )
            if response.id in found:
                raise UserError(
                    f"{where}: id {response.id!r} was answered before, at {found[response.id][0]}"
                )
            found[response.id] = (where, response)
    missing = [question.id for question in questions if question.id not in found]
    if missing:
        raise UserError(
            f"--score {' '.join(patterns)}: {len(missing)} of {len(questions)} questions have no "
            f"response: {_name_some(missing)}; the score is over all questions, so give every one "
            "a line (its text may be empty), or choose --year"
        )
    return [found[question.id][1] for question in questions]


def parse_response(where: str, record: dict[str, object]) -> Response:
    """The response of one line, which lies at `where`.

    Raises:
        UserError: a field is missing or of the wrong type.
    """
    published = "problem_id" in record
    id_ = take_string(where, record, "problem_id" if published else "id")
    if published and "text" not in record:
        said = take_string(where, record, "prediction")
        return Response(id_, said, said)
    prediction = take_string(where, record, "prediction") if "prediction" in record else None
    stop_reason = take_string(where, record, "stop_reason") if "stop_reason" in record else ""
    if stop_reason not in ("", "eos", "stop", "length"):
        raise UserError(f"{where}: stop_reason is {stop_reason!r}; allowed: eos, stop, length")
    tokens = record.get("tokens", 0)
    if type(tokens) is not int or tokens < 0:
        raise UserError(f"{where}: tokens is {tokens!r}; a count is wanted")
    return Response(id_, take_string(where, record, "text"), prediction, stop_reason, tokens)


def to_record(response: Response) -> dict[str, object]:
    """The line of a response; `read_responses` reads it back."""
    return {
        name: value for name, value in dataclasses.asdict(response).items() if value is not None
    }


def _name_some(ids: Iterable[str], most: int = 5) -> str:
    names = list(ids)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
