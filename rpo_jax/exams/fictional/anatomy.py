"""Explanations taken apart: is a fact recalled of each choice, judged rightly, and followed.

An explanation that is right for the right reasons recalls the needed fact of every choice, says of
each whether it applies, and names the letters that its own verdicts name. What of it a model gets
wrong is read off here, against the ground truth of the question. Source: ours.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rpo_jax.exams.fictional.kinds import LETTERS, judge
from rpo_jax.exams.igakuqa import Question

# What a line says of its choice: the fact of the ground truth; the same relation of the same
# subject with other objects; another fact, of it or of something else; none at all.
FACTS = ("needed", "wrong", "other", "none")

_VERDICT = f"(?P<verdict>{judge(False)}|{judge(True)})"
_LINE = re.compile(rf"(?P<letter>[{LETTERS}]) ?(?P<clause>.*?)(?:であり)?、?{_VERDICT}")
_END = re.compile(rf"{_VERDICT}のは(?P<letters>[{LETTERS}](?:と[{LETTERS}])*)である")


@dataclass(frozen=True)
class Line:
    """What is said of a choice: a clause, subject and relation は objects; whether it applies."""

    clause: str
    applies: bool

    @property
    def about(self) -> str:
        """Subject and relation; "" where no fact is told."""
        head, _, objects = self.clause.partition("は")
        return head if objects and "の" in head else ""

    @property
    def objects(self) -> frozenset[str]:
        """What the fact tells of it, in whatever order."""
        return frozenset(self.clause.partition("は")[2].split("、"))


def read_lines(text: str) -> dict[str, Line]:
    """The first line of each letter."""
    found: dict[str, Line] = {}
    for sentence in text.split("\n")[0].split("。"):
        if line := _LINE.fullmatch(sentence.strip()):
            said = Line(line["clause"], line["verdict"] == judge(True))
            found.setdefault(line["letter"], said)
    return found


def follows(text: str) -> bool:
    """Whether an explanation ends in the letters that its verdicts name."""
    text = text.split("\n")[0]
    end = _END.search(text)
    if not end:
        return False
    wanted = end["verdict"] == judge(True)
    named = {letter for letter, line in read_lines(text).items() if line.applies == wanted}
    return named == set(end["letters"].split("と"))


def take_apart(questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float | None]:
    """What explanations get right, as shares.

    Args:
        questions: with their ground truth; those without choices are passed over.
        texts: an explanation each.

    Returns:
        Of all choices: ``line``, those that have a line with a verdict, and by what that line
        tells ``needed``, ``wrong``, ``other`` and ``none`` (see `FACTS`), which add up to it. Of
        the lines with the needed fact, ``verdict``: the mean of the shares of right verdicts on
        what applies and on what does not, so that guessing gives 0.5; None where there is no line
        of either. Of the texts: ``follows``, see `follows`.
    """
    told: Counter[str] = Counter()
    verdicts: dict[bool, list[bool]] = {True: [], False: []}  # by truth, whether right
    choices, followed = 0, []
    for question, text in zip(questions, texts, strict=True):
        if not question.choices:
            continue
        truth, lines = read_lines(question.explanation or ""), read_lines(text)
        choices += len(truth)
        followed.append(follows(text))
        for letter in truth.keys() & lines.keys():
            fact = _name_fact(lines[letter], truth[letter])
            told[fact] += 1
            if fact == "needed":
                applies = truth[letter].applies
                verdicts[applies].append(lines[letter].applies == applies)
    return {
        "line": told.total() / max(choices, 1),
        **{fact: told[fact] / max(choices, 1) for fact in FACTS},
        "verdict": mean(map(_share, verdicts.values())) if all(verdicts.values()) else None,
        "follows": _share(followed),
    }


def _share(right: Sequence[bool]) -> float:
    return sum(right) / max(len(right), 1)


def _name_fact(line: Line, truth: Line) -> str:
    if line.about == truth.about and line.objects == truth.objects:
        return "needed"
    if not line.about:
        return "none"
    return "wrong" if line.about == truth.about else "other"
