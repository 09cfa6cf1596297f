"""A sitting: one model takes an exam, question by question, and nothing is asked twice.

A sitting is a folder:

    sitting.json                   what was asked of whom, and how answers were drawn
    responses/<mode>-<seed>.jsonl  a line a question, on disk before the next one is counted
    report.json, report.html       made from these two, and made again at any time

Several hosts may share one: each asks its own share, and writes `<mode>-<seed>.<share>.jsonl`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rpo_jax.config import MODES as MODES
from rpo_jax.errors import UserError
from rpo_jax.exams.exam import Exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.prompts import FORMATS, PromptFormat
from rpo_jax.exams.responses import Response, parse_response, to_record
from rpo_jax.writing import hold, write_json

ANSWER_ONLY, EXPLAIN_FIRST = MODES
_RESPONSES = "responses"
NEXT_QUESTION = "\n問題:"  # how a model that does not stop begins another question

_PROMPTS = {  # by mode and demonstrations
    (ANSWER_ONLY, 3): "OFFICIAL_COMPLETION_V1",
    (ANSWER_ONLY, 0): "ANSWER_ZERO_SHOT_V1",
    (EXPLAIN_FIRST, 3): "EXPLAIN_V1",
    (EXPLAIN_FIRST, 0): "EXPLAIN_ZERO_SHOT_V1",
}
_CHAT_PROMPTS = {**_PROMPTS, (ANSWER_ONLY, 3): "OFFICIAL_V1"}  # a chat has the system line
_NAMED = {"ANSWER_ZERO_SHOT_V1": "NAME_ZERO_SHOT_V1"}  # in exams that want names for letters


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn.

    Attributes:
        max_tokens: of an answer, by mode.
        temperature: 0 takes the most probable token.
        top_k: among so many; 0: all.
        top_p: among the most probable ones that reach this probability.
        stop: texts that end an answer; it then counts as run on.
    """

    max_tokens: Mapping[str, int] = field(
        default_factory=lambda: {ANSWER_ONLY: 32, EXPLAIN_FIRST: 512}
    )
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = (NEXT_QUESTION,)


@dataclass(frozen=True)
class Sitting:
    """Who sits which exam, how; what two runs of one sitting agree on.

    Attributes:
        exam: by name.
        exam_dir: its folder.
        years: that were asked.
        questions: digest of all questions and demonstrations.
        asked: how many.
        model: the model's folder.
        step: of its checkpoint.
        weights: digest of its weights.
        shots: demonstrations in the prompts, which names their formats.
        drawing: how answers are drawn.
        data: fingerprints of what a run was trained on, by name; of other models none.
        chat: digest of the model's chat template, if that puts the questions.
        modes: all that were asked for so far; they may be asked one after the other.
    """

    exam: str
    exam_dir: str
    years: tuple[int, ...]
    questions: str
    asked: int
    model: str
    step: int
    weights: str
    shots: int
    drawing: Drawing
    data: Mapping[str, str] = field(default_factory=dict)
    chat: str = ""
    modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """One question to a model."""

    question: Question
    mode: str
    seed: int
    prompt: str


@dataclass(frozen=True)
class Share:
    """The part of a sitting that one of several hosts asks: each `count`-th, from `number` on."""

    number: int = 0
    count: int = 1

    def take(self, asks: Sequence[Ask]) -> Sequence[Ask]:
        """What this host asks."""
        return asks[self.number :: self.count]

    def name_file(self, mode: str, seed: int) -> str:
        """Where it writes, in the folder of responses."""
        own = f".{self.number}of{self.count}" if self.count > 1 else ""
        return f"{mode}-{seed}{own}.jsonl"


def parse_share(text: str) -> Share:
    """A share as a command line names it: "1/4" is the second of four; "" is all.

    Raises:
        UserError: it names none.
    """
    number, _, count = (text or "0/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--share={text}: like 0/4, 1/4, 2/4 and 3/4 is wanted")
    return Share(int(number), int(count))


Answer = Callable[[Sequence[Ask]], Iterator[tuple[Ask, Response]]]


def find_prompt(exam: Exam, mode: str, shots: int, chat: bool = False) -> PromptFormat:
    """An exam's prompt format in a mode with so many demonstrations, as text or for a template.

    Raises:
        UserError: there is none.
    """
    if (mode, shots) not in _PROMPTS:
        known = ", ".join(f"{m} with {s} shots" for m, s in _PROMPTS)
        raise UserError(f"--modes {mode} --shots {shots}: no such prompt; known: {known}")
    name = (_CHAT_PROMPTS if chat else _PROMPTS)[mode, shots]
    return FORMATS[_NAMED.get(name, name) if exam.names else name]


def choose_questions(questions: Sequence[Question], limit: int) -> list[Question]:
    """So many questions, evenly spread over the exam; 0: all of them."""
    if not limit or limit >= len(questions):
        return list(questions)
    return [questions[place * len(questions) // limit] for place in range(limit)]


def digest_questions(questions: Sequence[Question], demonstrations: Sequence[Question]) -> str:
    """A digest of everything that prompts and marks depend on."""
    content = json.dumps([asdict(q) for q in (*questions, *demonstrations)], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def open_sitting(folder: Path, sitting: Sitting, restart: bool = False) -> None:
    """Starts a sitting, or checks that the one in the folder is the same.

    Args:
        folder: of the sitting.
        sitting: that is wanted.
        restart: throw another sitting away.

    Raises:
        UserError: another sitting is there; says what differs.
    """
    path = folder / "sitting.json"
    wanted = json.loads(json.dumps(asdict(sitting)))
    changed = _find_changes(folder, wanted) if path.exists() else []
    if changed and restart:
        shutil.rmtree(folder)
    elif changed:
        raise UserError(
            f"{folder} holds another sitting ({'; '.join(changed)}); choose another --out"
        )
    before = read_sitting(folder) if path.exists() else None
    asked = {*sitting.modes, *(before.modes if before else ())}
    whole = replace(before or sitting, modes=tuple(mode for mode in MODES if mode in asked))
    if whole != before:
        (folder / _RESPONSES).mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(whole))


def _find_changes(folder: Path, wanted: dict[str, Any]) -> list[str]:
    there = json.loads(json.dumps(asdict(read_sitting(folder))))
    # A folder may move, the digests say whether it is the same; a mode may come later.
    free = ("exam_dir", "model", "modes")
    return [
        f"{name}: {there[name]!r} -> {wanted[name]!r}"
        for name in wanted
        if name not in free and there[name] != wanted[name]
    ]


def read_sitting(folder: Path) -> Sitting:
    """The sitting of a folder.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    path = folder / "sitting.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        drawing = {**stored["drawing"], "stop": tuple(stored["drawing"]["stop"])}
        years = tuple(stored["years"])
        modes = tuple(stored.get("modes", ()))
        return Sitting(**{**stored, "years": years, "drawing": Drawing(**drawing), "modes": modes})
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {folder} holds no sitting") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); restore it or choose another --out") from error


def ask_all(
    folder: Path,
    asks: Sequence[Ask],
    answer: Answer,
    answered: Callable[[Ask, Response], None] = lambda ask, response: None,
    share: Share | None = None,
) -> None:
    """Asks what has no answer on disk yet; each answer is on disk before the next is awaited.

    Args:
        folder: of the sitting.
        asks: everything that belongs to it.
        answer: puts questions of one mode to the model.
        answered: is told of each answer, those that were there already first.
        share: of them that is asked here, and that `answered` is told of; default: all.

    Raises:
        UserError: another process is asking the same share.
    """
    share = share or Share()
    with hold(folder / share.name_file("asking", 0)):
        _ask_rest(folder, asks, answer, answered, share)


def _ask_rest(
    folder: Path,
    asks: Sequence[Ask],
    answer: Answer,
    answered: Callable[[Ask, Response], None],
    share: Share,
) -> None:
    left: dict[str, list[Ask]] = {}
    stored = {}
    for mode, seed in dict.fromkeys((ask.mode, ask.seed) for ask in asks):
        _cut_torn_line(folder / _RESPONSES / share.name_file(mode, seed))
        stored[mode, seed] = {r.id: r for r in read_answers(folder, mode, seed)}
    for ask in share.take(asks):
        there = stored[ask.mode, ask.seed].get(ask.question.id)
        if there:
            answered(ask, there)
        else:
            left.setdefault(ask.mode, []).append(ask)
    for rest in left.values():
        for ask, response in answer(rest):
            _append(folder / _RESPONSES / share.name_file(ask.mode, ask.seed), response)
            answered(ask, response)


def list_answers(folder: Path) -> list[tuple[str, int]]:
    """The (mode, seed) of a sitting's files, in the order of modes and seeds."""
    files = (folder / _RESPONSES).glob("*-*.jsonl")
    stems = [path.name.partition(".")[0].rpartition("-") for path in files]
    found = {(mode, int(seed)) for mode, _, seed in stems if mode in MODES and seed.isdecimal()}
    return sorted(found, key=lambda pair: (MODES.index(pair[0]), pair[1]))


def read_answers(folder: Path, mode: str, seed: int) -> list[Response]:
    """The answers on disk, of all shares; a last line that a kill tore apart is left out.

    Raises:
        UserError: another line is damaged, or a question was answered twice.
    """
    responses: dict[str, Response] = {}
    for path in sorted((folder / _RESPONSES).glob(f"{mode}-{seed}.*jsonl")):
        content = path.read_bytes()
        for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
            where = f"{path}:{number}"
            try:
                response = parse_response(where, json.loads(line))
            except ValueError as error:
                raise UserError(f"{where}: damaged ({error}); delete that line") from error
            if response.id in responses:
                raise UserError(
                    f"{where}: {response.id} was answered before; delete one of the lines"
                )
            responses[response.id] = response
    return list(responses.values())


def _append(path: Path, response: Response) -> None:
    line = json.dumps(to_record(response), ensure_ascii=False) + "\n"
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(path: Path) -> None:
    """Takes off what a kill left of a last line, so that the next one begins anew."""
    content = path.read_bytes() if path.exists() else b""
    if _whole(content) < len(content):
        os.truncate(path, _whole(content))


def _whole(content: bytes) -> int:
    """The bytes of the lines that are whole."""
    return content.rfind(b"\n") + 1


def describe_settings(sitting: Sitting) -> dict[str, Any]:
    """The settings of a sitting, flat, for a report."""
    flat = asdict(sitting)
    return {**flat, **flat.pop("drawing")}
