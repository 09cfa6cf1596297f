"""Whether two ways of asking differ: the same questions, paired; several seeds; votes."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from rpo_jax.exams.exam import Exam
from rpo_jax.exams.responses import Response
from rpo_jax.exams.scoring import GROUPS, Mark, mark

RESAMPLES = 9999
CONFIDENCE = 0.95


def compare(
    first: Sequence[Sequence[Mark]], second: Sequence[Sequence[Mark]], rule: str
) -> dict[str, Any]:
    """The paired difference, second less first, over the same questions.

    Args:
        first: marks by seed, each over the same questions in the same order.
        second: likewise, by the other way of asking.
        rule: ``official`` or ``extracted``.

    Returns:
        ``points``: difference of the mean over seeds, with a percentile bootstrap interval over
        questions; ``share`` the same over all points. ``mcnemar``: for each pair of seeds, how many
        questions only one side got right, and the exact two-sided test. ``flips``: mean number of
        questions a seed lost and gained, by group.
    """
    questions = [one.question for one in first[0]]
    for marks in (*first, *second):
        assert [one.question.id for one in marks] == [q.id for q in questions]
    worth_Q = np.array([question.points for question in questions], float)
    first_SQ, second_SQ = _right(first, rule), _right(second, rule)
    change_Q = worth_Q * (second_SQ.mean(0) - first_SQ.mean(0))
    low, high = bootstrap_sum(change_Q)
    total = float(worth_Q.sum())
    points = {"difference": float(change_Q.sum()), "low": low, "high": high}
    return {
        "rule": rule,
        "confidence": CONFIDENCE,
        "points": points,
        "share": {name: value / total if total else 0.0 for name, value in points.items()},
        "mcnemar": [mcnemar(*pair) for pair in zip(first_SQ, second_SQ, strict=False)],
        "flips": {
            group: _count_flips([GROUPS[group](q) for q in questions], first_SQ, second_SQ)
            for group in GROUPS
        },
    }


def bootstrap_sum(values_Q: np.ndarray) -> tuple[float, float]:
    """A percentile bootstrap interval of a sum over questions, drawn anew with replacement."""
    if np.ptp(values_Q) == 0:
        return float(values_Q.sum()), float(values_Q.sum())
    found = stats.bootstrap(
        (values_Q,),
        np.sum,
        n_resamples=RESAMPLES,
        batch=500,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = found.confidence_interval
    return float(interval.low), float(interval.high)


def mcnemar(first_Q: np.ndarray, second_Q: np.ndarray) -> dict[str, float]:
    """McNemar's exact test: are questions that only one side got right split evenly?"""
    lost = int(np.sum(first_Q & ~second_Q))
    gained = int(np.sum(~first_Q & second_Q))
    p_value = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return {
        "both": int(np.sum(first_Q & second_Q)),
        "lost": lost,
        "gained": gained,
        "neither": int(np.sum(~first_Q & ~second_Q)),
        "p_value": float(p_value),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample; None for one value) over seeds."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation, "values": list(values)}


def measure_agreement(seeds: Sequence[Sequence[Mark]]) -> float | None:
    """How often two seeds give the same answer (none is one too); None for a single seed."""
    if len(seeds) < 2:
        return None
    pairs = [
        one.extraction.answer == other.extraction.answer
        for marks, others in itertools.combinations(seeds, 2)
        for one, other in zip(marks, others, strict=True)
    ]
    return float(np.mean(pairs))


def vote(exam: Exam, seeds: Sequence[Sequence[Mark]]) -> list[Mark]:
    """The marks of the answer that most seeds gave; of equals, the one of the earlier seed."""
    marks = []
    for same in zip(*seeds, strict=True):
        counts = Counter(one.extraction.answer for one in same if one.extraction.answer)
        winner = counts.most_common(1)[0][0] if counts else ()
        question = same[0].question
        marks.append(mark(exam, question, Response(question.id, ",".join(winner))))
    return marks


def _right(seeds: Sequence[Sequence[Mark]], rule: str) -> np.ndarray:
    return np.array([[getattr(one, rule) for one in marks] for marks in seeds], bool)


def _count_flips(
    names: Sequence[str], first_SQ: np.ndarray, second_SQ: np.ndarray
) -> dict[str, dict[str, float]]:
    seeds = min(len(first_SQ), len(second_SQ))
    lost_Q = (first_SQ[:seeds] & ~second_SQ[:seeds]).mean(0)
    gained_Q = (~first_SQ[:seeds] & second_SQ[:seeds]).mean(0)
    return {
        name: {
            "questions": int(sum(here)),
            "lost": float(lost_Q[here].sum()),
            "gained": float(gained_Q[here].sum()),
        }
        for name in sorted(set(names))
        for here in [np.array([n == name for n in names])]
    }
