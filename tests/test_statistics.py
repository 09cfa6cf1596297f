"""Paired statistics: against hand-worked numbers, definitions, and what an interval promises."""

import math

import numpy as np
import pytest

from rpo_jax.exams.exam import find_exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.responses import Response
from rpo_jax.exams.scoring import Mark, mark
from rpo_jax.exams.statistics import (
    bootstrap_sum,
    compare,
    mcnemar,
    measure_agreement,
    spread,
    vote,
)

EXAM = find_exam("fictional")


def questions(count: int) -> list[Question]:
    return [
        Question(
            f"1A{i}",
            "どれか。",
            ("い", "ろ", "は"),
            ("a",),
            points=1 + 2 * (i % 2),
            section="A",
            category="総論" if i % 3 else "外科",
        )
        for i in range(count)
    ]


def answer(letters: str) -> list[Mark]:
    """Marks of one answer letter a question; "-" is none."""
    return [
        mark(EXAM, question, Response(question.id, letter.replace("-", "わからない")))
        for question, letter in zip(questions(len(letters)), letters, strict=True)
    ]


def test_mcnemar_is_the_exact_binomial_test():
    first = np.array([True] * 9 + [False] * 3)
    second = np.array([True] * 2 + [False] * 7 + [True] * 1 + [False] * 2)
    found = mcnemar(first, second)
    assert (found["both"], found["lost"], found["gained"], found["neither"]) == (2, 7, 1, 2)
    assert found["p_value"] == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(first, first)["p_value"] == 1.0
    assert mcnemar(second, first)["p_value"] == found["p_value"]


def test_the_difference_is_in_points_and_pairs_questions():
    found = compare([answer("aaaa")], [answer("abab")], "extracted")
    assert found["points"]["difference"] == -6.0  # two questions of three points each
    assert found["share"]["difference"] == -6 / 8
    assert found["points"]["low"] <= -6 <= found["points"]["high"] <= 0
    assert found["flips"]["category"] == {
        "外科": {"questions": 2, "lost": 1.0, "gained": 0.0},
        "総論": {"questions": 2, "lost": 1.0, "gained": 0.0},
    }
    assert found["flips"]["answers"]["1"]["lost"] == 2.0


def test_equal_sides_differ_by_nothing():
    found = compare([answer("abca")], [answer("abca")], "extracted")
    assert found["points"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert found["mcnemar"][0]["p_value"] == 1.0


def test_seeds_are_averaged_before_questions_are_drawn():
    found = compare([answer("aa"), answer("ba")], [answer("ab"), answer("bb")], "extracted")
    assert found["points"]["difference"] == -3.0
    assert len(found["mcnemar"]) == 2
    assert found["flips"]["section"]["A"] == {"questions": 2, "lost": 1.0, "gained": 0.0}


def test_the_interval_is_that_of_the_normal_where_that_is_right():
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 1.0], 2000, p=[0.15, 0.8, 0.05])
    low, high = bootstrap_sum(values)
    half = 1.96 * math.sqrt(len(values)) * values.std()
    assert low == pytest.approx(values.sum() - half, abs=0.05 * half)
    assert high == pytest.approx(values.sum() + half, abs=0.05 * half)
    assert bootstrap_sum(values) == (low, high)  # the same draw every time


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(100):
        values = rng.choice([-1.0, 0.0, 1.0], 300, p=[0.12, 0.8, 0.08])
        low, high = bootstrap_sum(values)
        inside += low <= -0.04 * 300 <= high
    assert 88 <= inside <= 100  # binomial(100, 0.95) is below 88 with probability 0.002


def test_different_questions_cannot_be_compared():
    with pytest.raises(AssertionError):
        compare([answer("aaaa")], [answer("aaa")], "extracted")


def test_votes_take_the_majority_then_the_earlier_seed_and_skip_silence():
    seeds = [answer("ab-b-"), answer("bb-a-"), answer("ba-c-")]
    assert [one.extraction.answer for one in vote(EXAM, seeds)] == [("b",), ("b",), (), ("b",), ()]
    assert [one.extraction.answer for one in vote(EXAM, [answer("a-"), answer("ba")])] == [
        ("a",),
        ("a",),
    ]


def test_agreement_and_spread():
    assert measure_agreement([answer("ab")]) is None
    assert measure_agreement([answer("ab"), answer("ac")]) == 0.5
    assert measure_agreement([answer("--"), answer("--")]) == 1.0
    assert measure_agreement([answer("ab"), answer("ab"), answer("bb")]) == pytest.approx(4 / 6)
    assert spread([3.0]) == {"mean": 3.0, "deviation": None, "values": [3.0]}
    assert spread([1, 3])["deviation"] == pytest.approx(math.sqrt(2))
