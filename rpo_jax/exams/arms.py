"""Arms of a study side by side: the same questions, several worlds and seeds, two ways of asking.

Answers are counted a question each, whatever it is worth. A question's result is its mean over the
seeds of a world, and the questions of all worlds are one sample: intervals over questions are
percentile bootstraps of it. Source: ours.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpo_jax.exams.asking import ANSWER_ONLY, EXPLAIN_FIRST, MODES
from rpo_jax.exams.fictional.anatomy import take_apart
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.scoring import Mark, measure_rates
from rpo_jax.exams.statistics import CONFIDENCE, bootstrap_sum, mcnemar

RATES = ("parse", "stop")
GAINS = ("explain_first_gain", "difference_gain")  # less the same of the arm compared with
PARTS = ("ABC", "DEF")  # sections about what training questions are about, and about the rest


@dataclass(frozen=True)
class Sat:
    """What one run of an arm made of the questions of its world.

    Attributes:
        arm: by name.
        world: number of the world.
        seed: of the run.
        marks: by mode, in the order of the questions.
    """

    arm: str
    world: int
    seed: int
    marks: Mapping[str, Sequence[Mark]]

    def right(self, mode: str) -> np.ndarray:
        """Which questions were answered rightly, by the answer read out of the text."""
        return np.array([mark.extracted for mark in self.marks[mode]], bool)

    def scores(self) -> dict[str, float]:
        """Accuracies, their difference, and rates, by names ready for a table."""
        found: dict[str, float] = {}
        for mode in MODES:
            rates = measure_rates(self.marks[mode])
            found[mode] = float(self.right(mode).mean())
            found |= {f"{mode}_{name}": float(rates[name] or 0.0) for name in RATES}
        return {**found, "difference": found[EXPLAIN_FIRST] - found[ANSWER_ONLY]}

    def gains(self, sats: "Sequence[Sat]", start: str) -> dict[str, float]:
        """What explaining and the difference gain over the run of `start` with the same seed."""
        asked = (start, self.world, self.seed)
        same = [other for other in sats if (other.arm, other.world, other.seed) == asked]
        if self.arm == start or not same:
            return {}
        own, theirs = self.scores(), same[0].scores()
        measures = (EXPLAIN_FIRST, "difference")
        return {gain: own[x] - theirs[x] for gain, x in zip(GAINS, measures, strict=True)}


def compare_arms(sats: Sequence[Sat], start: str) -> dict[str, dict[str, Any]]:
    """By arm: accuracies, the difference between the modes, and how both differ from an arm's.

    Args:
        sats: of all arms; the runs of a world answered the same questions.
        start: the arm that the others are compared with.

    Returns:
        Estimates ``{value, low, high}`` of ``answer_only``, ``explain_first``, ``difference``
        (explaining first less answering only), ``explain_first_gain`` and ``difference_gain``
        (these less the same of `start`, paired by question), with ``questions``, ``runs``, what
        ``guessing`` gets right of them,
        ``mcnemar`` a run, the first three under ``sections`` for each part of `PARTS` and under
        ``kinds`` for each category of question, and what its ``explanations`` get right (see
        `fictional.anatomy.take_apart`), of all questions and ``explanations_by_kind``.
    """
    for same in _by_world(sats):
        asked = {tuple(m.question.id for m in sat.marks[mode]) for sat in same for mode in MODES}
        assert len(asked) == 1, f"world {same[0].world}: runs answered different questions"
    found = {}
    base = [sat for sat in sats if sat.arm == start]
    for arm in dict.fromkeys(sat.arm for sat in sats):
        own = [sat for sat in sats if sat.arm == arm]
        by_mode = {mode: _pool(own, mode) for mode in MODES}
        change_Q = by_mode[EXPLAIN_FIRST] - by_mode[ANSWER_ONLY]
        measures = {**by_mode, "difference": change_Q}
        asked_Q = _list_questions(own)
        parts_Q = [next(part for part in PARTS if question.section in part) for question in asked_Q]
        result: dict[str, Any] = {
            "runs": len(own),
            "questions": len(change_Q),
            "guessing": float(np.mean([guess_share(question) for question in asked_Q])),
            **_estimate_all(measures),
            "sections": _estimate_each(measures, parts_Q),
            "kinds": _estimate_each(measures, [question.category for question in asked_Q]),
            **_take_explanations_apart(own),
            "mcnemar": [mcnemar(sat.right(ANSWER_ONLY), sat.right(EXPLAIN_FIRST)) for sat in own],
        }
        if arm != start:
            result |= _estimate_gains(own, base)
        found[arm] = result
    return found


def contrast_arms(sats: Sequence[Sat], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Each of some arms less each one before it.

    Args:
        sats: of all arms; the runs of a world answered the same questions.
        arms: to be compared, by name.

    Returns:
        For each pair ``arm`` and ``less``, and of ``explain_first`` and ``difference`` (explaining
        first less answering only) the estimate, paired by question, and by ``runs`` the change
        between the two runs with the same world and seed.
    """
    found = []
    for less, arm in itertools.combinations(arms, 2):
        own, theirs = ([sat for sat in sats if sat.arm == name] for name in (arm, less))
        measures = dict(zip((EXPLAIN_FIRST, "difference"), GAINS, strict=True))
        over_questions = _estimate_gains(own, theirs)
        over_runs = [gain for sat in own if (gain := sat.gains(sats, less))]
        found.append(
            {
                "arm": arm,
                "less": less,
                **{measure: over_questions[gain] for measure, gain in measures.items()},
                "runs": {m: [run[gain] for run in over_runs] for m, gain in measures.items()},
            }
        )
    return found


def list_marks(sats: Sequence[Sat]) -> list[dict[str, Any]]:
    """A row a question of a world: whether each run was right, 1 or 0, in each way of asking."""
    rows: list[dict[str, Any]] = []
    for same in _by_world(sats):
        right = {f"{s.arm} seed {s.seed} {mode}": s.right(mode) for s in same for mode in MODES}
        for place, question in enumerate(_list_questions(same)):
            asked = {"world": same[0].world, "question": question.id, "kind": question.category}
            rows.append(asked | {run: int(right_Q[place]) for run, right_Q in right.items()})
    return rows


def guess_share(question: Question) -> float:
    """How often so many letters as are wanted, drawn by lot, are the right ones."""
    if question.is_numeric:
        return 0.0
    return 1 / math.comb(len(question.choices), len(question.accepted[0]))


def estimate(values_Q: np.ndarray, least: float = -1.0) -> dict[str, float]:
    """The mean over questions with its bootstrap interval.

    Where all values are the same a bootstrap has nothing to draw. Then the interval reaches as far
    as other values could be the share of questions, and of so many none show it in one of 40 cases.

    Args:
        values_Q: of each question, from `least` to 1.
        least: 0 of an accuracy, -1 of a difference.
    """
    count, value = len(values_Q), float(values_Q.mean())
    if np.ptp(values_Q) == 0:
        unseen = 1 - ((1 - CONFIDENCE) / 2) ** (1 / count)
        return {"value": value, "low": max(value - unseen, least), "high": min(value + unseen, 1.0)}
    low, high = bootstrap_sum(values_Q)
    return {"value": value, "low": low / count, "high": high / count}


def _estimate_all(measures: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {
        name: estimate(values_Q, 0.0 if name in MODES else -1.0)
        for name, values_Q in measures.items()
    }


def _estimate_gains(own: Sequence[Sat], theirs: Sequence[Sat]) -> dict[str, dict[str, float]]:
    """What explaining and the difference gain over another arm, paired by question."""
    explained_Q, answered_Q = (
        _pool(own, mode) - _pool(theirs, mode) for mode in (EXPLAIN_FIRST, ANSWER_ONLY)
    )
    changes = (explained_Q, explained_Q - answered_Q)
    return {gain: estimate(change_Q) for gain, change_Q in zip(GAINS, changes, strict=True)}


def _estimate_each(
    measures: Mapping[str, np.ndarray], names_Q: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Estimates over the questions of each name, by name."""
    places = {name: np.array(names_Q) == name for name in sorted(set(names_Q))}
    return {
        name: _estimate_all({measure: values_Q[here] for measure, values_Q in measures.items()})
        for name, here in places.items()
    }


def _pool(sats: Sequence[Sat], mode: str) -> np.ndarray:
    """The mean over seeds of each question, of one world after the other."""
    return np.concatenate(
        [np.mean([sat.right(mode) for sat in same], 0) for same in _by_world(sats)]
    )


def _take_explanations_apart(sats: Sequence[Sat]) -> dict[str, Any]:
    marks = [mark for sat in sats for mark in sat.marks[EXPLAIN_FIRST]]

    def measure(marks: Sequence[Mark]) -> dict[str, float | None]:
        return take_apart([mark.question for mark in marks], [m.response.text for m in marks])

    kinds = sorted({mark.question.category for mark in marks if mark.question.choices})
    by_kind = {kind: measure([m for m in marks if m.question.category == kind]) for kind in kinds}
    return {"explanations": measure(marks), "explanations_by_kind": by_kind}


def _list_questions(sats: Sequence[Sat]) -> list[Question]:
    """What was asked, in the order of `_pool`."""
    marks = [mark for same in _by_world(sats) for mark in same[0].marks[ANSWER_ONLY]]
    return [mark.question for mark in marks]


def _by_world(sats: Sequence[Sat]) -> list[list[Sat]]:
    worlds = sorted({sat.world for sat in sats})
    return [[sat for sat in sats if sat.world == world] for world in worlds]
