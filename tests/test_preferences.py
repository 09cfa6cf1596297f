"""Which text is preferred to which: strategies, limits, balance, and an account that adds up."""

import random
from dataclasses import replace

import pytest

from rpo_jax.config import Pair as Rules
from rpo_jax.data.ledger import Ledger
from rpo_jax.exams.candidates import judge
from rpo_jax.exams.exam import find_exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.preferences import (
    STRATEGIES,
    Letters,
    Preference,
    Text,
    balance_letters,
    explain_lack,
    letters_apart,
    prefer,
    sort_texts,
)
from rpo_jax.exams.prompts import ANSWER_ZERO_SHOT_V1, EXPLAIN_ZERO_SHOT_V1
from rpo_jax.exams.responses import Response

EXAM = find_exam("igakuqa")
QUESTION = Question("112A1", "正しいのはどれか。", ("甲", "乙", "丙", "丁", "戊"), ("b",))
TRUTH = "甲は熱い。乙は冷たい。"
SAID = [
    "甲は冷たい。\n答え: a",
    "乙は冷たいらしい。\n答え: b",
    "丙は冷たい。\n答え: c",
    "丁は冷たい。\n答え: d",
    "乙だと思う。\n答え: b",
    "分からない。",
]
WIDE = Rules(pairs_per_question=100, max_length_ratio=100.0)


def sort(said=SAID, style=EXPLAIN_ZERO_SHOT_V1, explanation=TRUTH, stop_reason="eos"):
    mode = "explain_first" if style.explains else "answer_only"
    ledger = Ledger("answers")
    candidates = [
        judge(EXAM, QUESTION, mode, str(seed), Response(QUESTION.id, text, None, stop_reason))
        for seed, text in enumerate(said)
    ]
    return sort_texts(QUESTION, style, candidates, explanation, ledger), ledger


def choose(tiers, rules=WIDE, letters=None):
    ledger = Ledger("pairs")
    found = prefer("q", tiers, rules, letters or Letters.count(()), ledger)
    return [(one.chosen.key, one.rejected.key) for one in found], ledger


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("right_over_wrong", {(r, w) for r in "14" for w in "023"}),
        ("truth_over_wrong", {("truth", w) for w in "023"}),
        ("truth_over_any", {("truth", any_) for any_ in "012345"}),
        (
            "hierarchy",
            {(r, w) for r in "14" for w in "023"} | {("truth", other) for other in "01234"},
        ),
    ],
)
def test_each_strategy_prefers_what_it_says(strategy, wanted):
    found, ledger = choose(sort()[0], replace(WIDE, strategy=strategy))
    assert len(found) == len(set(found)) and set(found) == wanted
    assert not ledger.dropped
    assert set(STRATEGIES) == {
        "right_over_wrong",
        "truth_over_wrong",
        "truth_over_any",
        "hierarchy",
    }


def test_the_ground_truth_is_written_as_the_prompt_has_it():
    (truth,) = sort()[0]["truth"]
    assert truth.text == f"{TRUTH}\n答え: b"
    (truth,) = sort(style=ANSWER_ZERO_SHOT_V1, explanation=None)[0]["truth"]
    assert truth.text == "\nb"
    assert sort(explanation=None)[0]["truth"] == []


def test_answers_alone_are_written_as_the_prompt_has_them():
    tiers, ledger = sort(["b", "答え: a", "ｂ", "a", "分からない"], ANSWER_ZERO_SHOT_V1, None)
    assert [text.text for text in tiers["right"]] == ["\nb"]
    assert [text.text for text in tiers["wrong"]] == ["\na"]
    assert ledger.kept == 2 and ledger.dropped_count == 3
    assert ledger.dropped["an answer alone that is none"].count == 1
    # The right answer and the ground truth are then one text, and its pair is counted once.
    found, pairs = choose(tiers, replace(WIDE, strategy="hierarchy"))
    assert found == [("truth", "1")]
    assert {reason: drop.count for reason, drop in pairs.dropped.items()} == {
        "the texts of another pair": 1,
        "the same text twice": 1,
    }


def test_answers_of_no_use_are_counted_with_an_example():
    said = [SAID[0], SAID[0], "答え: b\n問題: 次", " ", "答え: a\n問題: 次"]
    tiers, ledger = sort(said)
    assert [text.key for text in tiers["wrong"]] == ["0", "4"] and not tiers["right"]
    assert {reason: drop.example for reason, drop in ledger.dropped.items()} == {
        "the same text as another answer to the question": "112A1, explain_first, 1",
        "right, but goes on after its answer": r"112A1, explain_first, 2: '答え: b\n問題: 次'",
        "empty": "112A1, explain_first, 3",
    }
    tiers, ledger = sort(stop_reason="length")
    assert ledger.dropped["cut off at the most tokens"].count == len(SAID) and not ledger.kept
    assert not tiers["right"] + tiers["wrong"] + tiers["unclear"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_question_that_lacks_something_says_what(strategy):
    told = explain_lack(sort(["分からない。"], explanation=None)[0], strategy)
    assert (
        told
        == {
            "right_over_wrong": "no right answer and no wrong answer",
            "truth_over_wrong": "no ground truth and no wrong answer",
            "truth_over_any": "no ground truth and no wrong answer and no right answer",
            "hierarchy": "no ground truth and no wrong answer and no right answer",
        }[strategy]
    )
    assert explain_lack(sort()[0], strategy) == "all its pairs are left out"


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6, 9])
def test_so_many_pairs_a_question_in_turns_and_nothing_lost(limit):
    tiers, _ = sort()
    rules = replace(WIDE, pairs_per_question=limit)
    found, ledger = choose(tiers, rules)
    assert len(found) == limit and len(found) + ledger.dropped_count == 11
    truth_over_wrong = sum(c == "truth" and r in "023" for c, r in found)
    right_over_wrong = sum(c != "truth" for c, _ in found)
    shares = sorted(
        (truth_over_wrong, right_over_wrong, limit - truth_over_wrong - right_over_wrong)
    )
    assert (
        shares[-1] - shares[0] <= 1 or limit == 9
    )  # two answers are all that truth over right has
    if limit >= 6:
        assert {rejected for _, rejected in found} >= set("023")


def test_pairs_do_not_depend_on_the_order_of_answers():
    tiers, _ = sort()
    rules = replace(WIDE, pairs_per_question=4)
    wanted, _ = choose(tiers, rules)
    for seed in range(5):
        mixed = {
            name: random.Random(seed).sample(texts, len(texts)) for name, texts in tiers.items()
        }
        assert choose(mixed, rules)[0] == wanted


def test_texts_too_unlike_in_length_or_too_alike_make_no_pair():
    said = ["乙。\n答え: b", "甲である。\n答え: a", "長い。" * 20 + "\n答え: c"]
    tiers, _ = sort(said, explanation=None)
    rules = replace(WIDE, strategy="right_over_wrong", max_length_ratio=2.0)
    found, ledger = choose(tiers, rules)
    assert found == [("0", "1")]
    (reason,) = ledger.dropped
    assert reason == "one text longer than 2 times the other"
    assert ledger.dropped[reason].example == "q, 0 over 2"
    said = [
        "甲は冷たい。乙は熱い。\n答え: b",
        "甲は冷たい。乙は熱い。\n答え: a",
        "丙は青い。\n答え: c",
    ]
    tiers, _ = sort(said, explanation=None)
    found, ledger = choose(tiers, replace(rules, max_length_ratio=9.0, max_similarity=0.7))
    assert found == [("0", "2")] and list(ledger.dropped) == ["more alike than 0.7"]
    assert set(choose(tiers, replace(rules, max_length_ratio=9.0))[0]) == {("0", "1"), ("0", "2")}


def test_among_equals_the_letters_are_brought_into_balance():
    tiers, _ = sort(explanation=None)
    rules = replace(WIDE, strategy="right_over_wrong", pairs_per_question=1)
    for favourite in "acd":
        letters = Letters.count(())
        letters.preferred[favourite] += 5
        ((_, rejected),), _ = choose(tiers, rules, letters)
        assert {"0": "a", "2": "c", "3": "d"}[rejected] == favourite
        assert letters.dispreferred[favourite] == 1 and letters.preferred["b"] == 1


def make_preferences(letters: str) -> list[tuple[str, Preference]]:
    """`ab` prefers a to b, one for each two letters."""
    return [
        (f"{place}", Preference(*(Text(x, x, (x,)) for x in letters[2 * place :][:2]), ("", "")))
        for place in range(len(letters) // 2)
    ]


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
def test_no_letter_is_dispreferred_too_often(ratio):
    rng = random.Random(0)
    pairs = [rng.choice("bcde") + "a" for _ in range(60)]
    pairs += ["".join(rng.sample("abcde", 2)) for _ in range(90)]
    given = make_preferences("".join(rng.sample(pairs, len(pairs))))
    ledger = Ledger("pairs")
    kept = balance_letters(given, ratio, ledger)
    letters = Letters.count(preference for _, preference in kept)
    assert len(kept) + ledger.dropped_count == len(given)
    assert len(kept) > len(given) // 4
    for letter in "abcde":
        assert letters.dispreferred[letter] <= ratio * (letters.preferred[letter] + 1)
    assert balance_letters(kept, ratio, Ledger("pairs")) == kept
    assert [pair for pair in given if pair in kept] == kept


def test_balance_is_off_at_0_and_knows_letters_only():
    given = make_preferences("bacada")
    assert balance_letters(given, 0.0, Ledger("pairs")) == given
    numbers = [("n", Preference(Text("x", "1", ("1.5",)), Text("y", "2", ("15",)), ("", "")))]
    assert balance_letters(numbers, 1.0, Ledger("pairs")) == numbers
    assert letters_apart(("a", "c"), ("c", "d")) == {"a"}
    assert balance_letters(given, 1.0, Ledger("pairs")) == given[:1]
