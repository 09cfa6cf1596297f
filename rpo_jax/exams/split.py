"""What a run may learn of an exam, and what it will be examined on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rpo_jax.config import Config
from rpo_jax.data.overlap import index_questions
from rpo_jax.data.records import digest
from rpo_jax.exams import fictional
from rpo_jax.exams.asking import choose_questions
from rpo_jax.exams.exam import Exam, find_exam
from rpo_jax.exams.fictional import SPLIT_YEARS
from rpo_jax.exams.igakuqa import Question

_GRAM = 8  # letters and digits: in 13 a question as short as some are has none


@dataclass(frozen=True)
class Split:
    """The questions of an exam, parted.

    Attributes:
        exam: which.
        directory: of its years.
        taught: questions that may be trained on.
        examined: questions that measure the result; no pair comes from one, or from its like.
        demonstrations: worked examples for prompts.
    """

    exam: Exam
    directory: Path
    taught: tuple[Question, ...]
    examined: tuple[Question, ...]
    demonstrations: tuple[Question, ...]


def split_exam(config: Config) -> Split:
    """The exam of `data.sample`: the years trained on, and the others that the config names.

    Raises:
        UserError: there is no such exam, or no copy of it.
    """
    data = config.data
    exam = find_exam(data.sample.exam)
    if exam.name == "fictional":
        directory = find_world(config) / "exam"
        taught: Sequence[int] = (SPLIT_YEARS["train"],)
        examined: Sequence[int] = (SPLIT_YEARS["dev"], SPLIT_YEARS["test"])
    else:
        directory = exam.find(data.igakuqa.directory)
        taught, examined = data.igakuqa.train_years, data.igakuqa.heldout_years
    return Split(
        exam,
        directory,
        tuple(choose_questions(exam.read(directory, taught), data.sample.limit)),
        tuple(exam.read(directory, examined)),
        tuple(exam.demonstrate(directory)),
    )


def find_world(config: Config) -> Path:
    """The folder of the fictional world, generated where it is not there yet."""
    wanted = config.data.fictional
    name = f"world-{fictional.VERSION}-{wanted.size}-{wanted.seed}"
    world = fictional.make_world(wanted.seed, fictional.SIZES[wanted.size])
    return fictional.write_world(Path(config.workdir) / "data" / name, world)


def find_leaks(
    taught: Sequence[Question], examined: Sequence[Question], share: float
) -> dict[str, tuple[str, float]]:
    """The taught questions that are an examined one or nearly one.

    Args:
        taught: to be checked.
        examined: to be kept out.
        share: of the 8-grams of an examined question, text and choices; a taught one that holds so
            many of them is nearly the same.

    Returns:
        By id of a taught question the examined one that it holds most of, and how much.
    """
    index = index_questions({question.id: [tell(question)] for question in examined}, _GRAM)
    leaks = {}
    for question in taught:
        shares = index.find(tell(question))
        nearest = max(shares, key=lambda id_: (shares[id_], id_), default="")
        if nearest and shares[nearest] >= share:
            leaks[question.id] = (nearest, shares[nearest])
    return leaks


def hold_out(questions: Sequence[Question], heldout_share: float, alike_share: float) -> set[str]:
    """The ids of the questions whose pairs are held out.

    Questions that are alike (in the sense of `find_leaks`, through any chain) are on one side. The
    choice follows from the questions alone: another sampling, or another round, has the same.
    """
    groups = list(_group(questions, alike_share).values())
    groups.sort(key=lambda ids: digest(["held out", ids]))
    wanted, found = math.ceil(heldout_share * len(questions)), set[str]()
    for ids in groups:
        if len(found) + len(ids) <= wanted:
            found |= set(ids)
    smallest = min(groups, key=len)
    return found or set(smallest)


def _group(questions: Sequence[Question], share: float) -> dict[str, list[str]]:
    """Ids of like questions, by one of them."""
    index = index_questions({question.id: [tell(question)] for question in questions}, _GRAM)
    heads = {question.id: question.id for question in questions}

    def find_head(id_: str) -> str:
        while heads[id_] != id_:
            id_ = heads[id_]
        return id_

    for question in questions:
        for other, shared in index.find(tell(question)).items():
            if shared >= share:
                first, second = sorted((find_head(question.id), find_head(other)))
                heads[second] = first
    groups: dict[str, list[str]] = {}
    for question in questions:
        groups.setdefault(find_head(question.id), []).append(question.id)
    return groups


def tell(question: Question) -> str:
    """The text of a question with its choices."""
    return "\n".join((question.text, *question.choices))
