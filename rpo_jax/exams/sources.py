"""What a run reads: files, the fictional world, or an exam, as text or as pairs."""

import itertools
import json
import logging
import os
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from rpo_jax.config import Config
from rpo_jax.data import corpus, pairs
from rpo_jax.data.corpus import Document, read_documents
from rpo_jax.data.files import Span, digest_files, find_files, read_objects, take_string
from rpo_jax.data.overlap import Questions, fold, index_questions
from rpo_jax.data.pairs import Pair, read_pairs
from rpo_jax.data.records import digest
from rpo_jax.data.screening import GENERAL, HELDOUT, TRAIN, Collection
from rpo_jax.errors import UserError
from rpo_jax.exams import fictional, igakuqa
from rpo_jax.exams.exam import Exam, find_exam, list_exams
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.prompts import ANSWER_ZERO_SHOT_V1, OFFICIAL_COMPLETION_V1
from rpo_jax.exams.split import find_world
from rpo_jax.writing import write_whole

TextFiles = dict[Collection, list[epath.Path]]

_HELDOUT_EVERY = 20  # passages of a world that have no held-out file of their own
_STEM_LETTERS = 60  # a question's text alone, without its choices, is telling if it is so long


@dataclass(frozen=True)
class PairSource:
    """Pairs, as a stream that can be read again, and all that they depend on.

    Attributes:
        files: whose content they are made of: path, bytes and sha256 of each.
        rule: how; another way of making pairs from the same files is another rule.
        read: starts the stream.
    """

    files: Sequence[Mapping[str, Any]]
    rule: str
    read: Callable[[], Iterator[Pair]]


def find_text(config: Config) -> TextFiles:
    """The text files that a cpt stage trains on and holds out.

    Raises:
        UserError: files or folders that are not there.
    """
    match config.data.source:
        case "fictional":
            found = _text_of_world(config)
        case "igakuqa":
            exam = config.data.igakuqa
            found = {
                Collection(f"IgakuQA {years}", split): [_tell_exam(config, years)]
                for split, years in ((TRAIN, exam.train_years), (HELDOUT, exam.heldout_years))
            }
        case _:
            found = _match(config, TRAIN) | _match(config, HELDOUT)
    return found | _match(config, GENERAL)


def _match(config: Config, split: str) -> dict[Collection, list[epath.Path]]:
    """The text files of a split; each belongs to the first pattern that matches it."""
    found: dict[Collection, list[epath.Path]] = {}
    seen: set[str] = set()
    for pattern in getattr(config.data, split):
        files = find_files([pattern], corpus.SUFFIXES, f"data.{split}")
        found[Collection(pattern, split)] = [f for f in files if os.fspath(f) not in seen]
        seen.update(map(os.fspath, files))
    return found


def find_pairs(config: Config) -> tuple[PairSource, PairSource]:
    """The pairs that an rpo stage trains on, and those it holds out.

    Raises:
        UserError: files or folders that are not there, or a held-out file that is trained on.
    """
    match config.data.source:
        case "fictional":
            world = epath.Path(find_world(config))
            files = [[world / "pairs_train.jsonl"], [world / "pairs_heldout.jsonl"]]
        case "igakuqa":
            exam = config.data.igakuqa
            return _prefer_exam(config, exam.train_years), _prefer_exam(config, exam.heldout_years)
        case _:
            files = [
                list(find_files(getattr(config.data, split), pairs.SUFFIXES, f"data.{split}"))
                for split in (TRAIN, HELDOUT)
            ]
    train, heldout = (read_as_they_are(paths) for paths in files)
    check_apart(train.files, heldout.files)
    return train, heldout


def check_apart(train: Iterable[Mapping[str, Any]], heldout: Iterable[Mapping[str, Any]]) -> None:
    """Refuses a held-out file that is trained on.

    Raises:
        UserError: names both.
    """
    trained = {file["sha256"]: file["path"] for file in train}
    for file in heldout:
        if file["sha256"] in trained:
            raise UserError(
                f"data.heldout: {file['path']} holds the same as {trained[file['sha256']]} of "
                "data.train"
            )


def find_questions(config: Config) -> Questions | None:
    """The questions that a run is evaluated on, to be kept out of its text; None: not wanted.

    Raises:
        UserError: an exam that is named and not there.
    """
    if not config.data.corpus.decontaminate:
        return None
    asked = list(_read_questions(config))
    if not asked:
        logging.warning(
            "warning: no evaluation questions are known, so NONE ARE KEPT OUT of the training "
            "text, and the records are others than where they are known: name the exam "
            "(--config.data.corpus.exams=\"('igakuqa',)\"), or set IGAKUQA_DIR on every machine"
        )
        return None
    return index_questions({name: _versions(question) for name, question in asked})


def _read_questions(config: Config) -> Iterator[tuple[str, Question | str]]:
    named = config.data.corpus.exams
    if not named and config.data.source == "fictional":
        years = [fictional.SPLIT_YEARS["test"]]
        yield from _ids(igakuqa.read_questions(find_world(config) / "exam", years))
        return
    if not named and config.data.source == "igakuqa":
        folder = find_exam_folder(config)
        yield from _ids(igakuqa.read_questions(folder, config.data.igakuqa.heldout_years))
        return
    for name in named or [name for name in list_exams() if _is_at_hand(name)]:
        if name.endswith(".jsonl"):
            for path in find_files([name], (".jsonl",), "data.corpus.exams"):
                for where, record in read_objects(path):
                    yield str(record.get("id", where)), take_string(where, record, "text")
            continue
        yield from _ids(read_kept_out(config, name)[1])


def read_kept_out(config: Config, name: str) -> tuple[Path, list[Question]]:
    """The folder of an exam of `data.corpus.exams`, and its questions.

    Raises:
        UserError: there is no such exam, nothing says where it is, or it cannot be read.
    """
    name, _, year = name.partition(":")
    exam = find_exam(name)
    if year and not year.isdecimal():
        raise UserError(f"data.corpus.exams: {name}:{year}: a year is wanted after the colon")
    named = _find_named(config, exam)
    if not named:
        also = ", or data.igakuqa.directory" if name == "igakuqa" else ""
        variable = exam.directory_variable
        mend = (
            f"set {variable}{also}, to a copy of {exam.source}"
            if variable
            else "name a .jsonl file"
        )
        raise UserError(
            f"data.corpus.exams={config.data.corpus.exams}: the questions of {name} are to be kept "
            f"out of the training text, and nothing says where they are: {mend}; "
            "--config.data.corpus.decontaminate=False trains on text that may hold them"
        )
    folder = Path(named).expanduser()
    return folder, exam.read(folder, [int(year)] if year else exam.years or None)


def _find_named(config: Config, exam: Exam) -> str:
    """The folder of an exam, by the config or the environment; "": neither says it."""
    ours = config.data.igakuqa.directory if exam.name == "igakuqa" else ""
    return ours or os.environ.get(exam.directory_variable, "")


def _is_at_hand(name: str) -> bool:
    return bool(os.environ.get(find_exam(name).directory_variable))


def _ids(questions: Iterable[Question]) -> Iterator[tuple[str, Question]]:
    return ((question.id, question) for question in questions)


def _versions(question: Question | str) -> list[str]:
    """The texts by which a question is known: with its choices, and without if it is long."""
    if isinstance(question, str):
        return [question]
    whole = "\n".join([question.text, *question.choices])
    return [whole, question.text] if len(fold(question.text)) >= _STEM_LETTERS else [whole]


def find_tokenizer_text(config: Config) -> tuple[list[epath.Path], Iterator[str]]:
    """What a tokenizer is trained on: the text trained on; of a world, that of all its stages.

    Returns:
        The files, and their texts as a stream.
    """
    if config.data.source == "fictional":
        world = epath.Path(find_world(config))
        files = [world / f"{name}.jsonl" for name in ("general", "textbook", "pairs_train")]
        return files, itertools.chain(_read_texts(config, files[:2]), _read_pair_texts(files[2:]))
    text = find_text(config)
    files = [file for source, paths in text.items() if source.split == TRAIN for file in paths]
    return files, _read_texts(config, files)


def _read_texts(config: Config, files: Iterable[epath.Path]) -> Iterator[str]:
    fields = config.data.corpus.text_field, config.data.corpus.id_field
    for file in files:
        yield from (document.text for document in read_documents(Span(str(file)), *fields))


def _read_pair_texts(files: Iterable[epath.Path]) -> Iterator[str]:
    for pair in read_pairs(files):
        yield from (pair.prompt, pair.chosen, pair.rejected)


def _text_of_world(config: Config) -> TextFiles:
    world = find_world(config)
    text = config.data.fictional.text
    found: dict[Collection, list[epath.Path]] = {}
    if text != "textbook":
        name = "general" if text == "both" else text
        passages = list(read_documents(Span(str(world / f"{name}.jsonl"))))
        held = passages[::_HELDOUT_EVERY]
        rest = [p for place, p in enumerate(passages) if place % _HELDOUT_EVERY]
        for split, documents in ((TRAIN, rest), (HELDOUT, held)):
            written = _write_texts(config, f"{name}_{split}", documents)
            found[Collection(f"{name} passages", split)] = [written]
    if text in ("textbook", "both"):
        for split, name in ((TRAIN, "textbook.jsonl"), (HELDOUT, "textbook_heldout.jsonl")):
            found[Collection("textbook", split)] = [epath.Path(world / name)]
    return found


def _tell_exam(config: Config, years: Sequence[int]) -> epath.Path:
    """Questions with their answers, as texts to read."""
    documents = []
    for question in igakuqa.read_questions(find_exam_folder(config), years):
        text = ANSWER_ZERO_SHOT_V1.render_worked(question)
        documents.append(Document(question.id, text, question.id))
    name = "_".join(map(str, sorted(set(years))))
    return _write_texts(config, f"igakuqa_{ANSWER_ZERO_SHOT_V1.name}_{name}", documents)


def _write_texts(config: Config, name: str, documents: Iterable[Document]) -> epath.Path:
    """Documents as a file of their own, under a name that tells its content."""
    lines = [
        json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n"
        for document in documents
    ]
    folder = Path(config.workdir) / "data" / f"text-{digest(lines)[:16]}"
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(lines))
    return epath.Path(path)


def find_exam_folder(config: Config) -> Path:
    """The copy of the exam that a run trains on.

    Raises:
        UserError: nothing says where it is.
    """
    named = _find_named(config, find_exam("igakuqa"))
    if not named:
        raise UserError(
            "data.source=igakuqa needs a copy of the exam: set data.igakuqa.directory, or "
            "IGAKUQA_DIR, to the folder that holds 2018 to 2022"
        )
    return Path(named).expanduser()


def read_as_they_are(paths: Sequence[epath.PathLike]) -> PairSource:
    """The pairs of files."""
    return PairSource(digest_files(paths), "as they are", lambda: read_pairs(paths))


def _prefer_exam(config: Config, years: Sequence[int]) -> PairSource:
    folder = find_exam_folder(config)
    questions = igakuqa.read_questions(folder, years)
    folders = [folder / str(year) for year in sorted(set(years))]
    files = [path for year in folders for path in sorted(year.glob("*.jsonl"))]
    demonstrations = igakuqa.read_demonstrations(folder)
    return PairSource(
        digest_files([*files, igakuqa.find_demonstrations(folder)]),
        f"{OFFICIAL_COMPLETION_V1.name}, right over wrong",
        lambda: (_prefer(question, demonstrations) for question in questions),
    )


def _prefer(question: Question, demonstrations: Sequence[Question]) -> Pair:
    """The right answer over a wrong one of the same length, drawn by the question's id."""
    style = OFFICIAL_COMPLETION_V1
    right = question.accepted[0]
    rng = random.Random(f"a wrong answer to {question.id}")
    wrong = right
    if question.is_numeric:
        while wrong == right:
            wrong = (re.sub(r"\d", lambda digit: rng.choice(string.digits), right[0]),)
    else:
        sets = itertools.combinations(question.letters, len(right))
        wrong = rng.choice([letters for letters in sets if letters not in question.accepted])
    return Pair(
        id=question.id,
        prompt=style.render(question, demonstrations),
        chosen=style.target(question, right),
        rejected=style.target(question, wrong),
    )
