"""Overlap: against sets of strings, by hand, and on the real exam."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpo_jax.data.overlap import (
    BINS,
    band_keys,
    fold,
    hash_ngrams,
    index_questions,
    jaccard,
    likeness,
    sign,
    take_ngrams,
)
from rpo_jax.exams.igakuqa import read_questions

LETTERS = "あいうえおかきくけこさしすせそ架空病薬abc123"


def spell(text):
    return "".join(map(chr, fold(text)))


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("ＧＢＳ（１２）、陽性。", "gbs12陽性"),
        ("ｶﾞ が Café\n①", "カかcafe1"),
        ("𠮷 --- 野", "𠮷野"),
        (" 。\n", ""),
        ("", ""),
    ],
)
def test_layout_and_width_are_folded_away(text, folded):
    assert spell(text) == folded


def grams_of(text, n):
    return {text[i : i + n] for i in range(len(text) - n + 1)}


@given(st.text(LETTERS, max_size=60), st.text(LETTERS, max_size=60), st.integers(1, 20))
def test_hashes_stand_for_the_strings(left, right, n):
    left, right = spell(left), spell(right)
    hashes = hash_ngrams(fold(left), n)
    assert len(hashes) == max(len(left) - n + 1, 0)
    assert len(set(hashes.tolist())) == len(grams_of(left, n))
    if min(len(left), len(right)) >= n:
        one, two = grams_of(left, n), grams_of(right, n)
        found = jaccard(take_ngrams(left, n), take_ngrams(right, n))
        assert found == pytest.approx(len(one & two) / len(one | two))


def test_a_short_text_is_one_gram():
    assert jaccard(take_ngrams("病気", 5), take_ngrams("病 気", 5)) == 1.0
    assert jaccard(take_ngrams("", 5), take_ngrams("", 5)) == 0.0


@given(st.lists(st.text(LETTERS, min_size=3, max_size=30), min_size=1, max_size=5), st.data())
def test_shares_are_those_of_sets(questions, data):
    text = data.draw(st.text(LETTERS, max_size=40)) + data.draw(st.sampled_from(questions))
    index = index_questions({str(i): [question] for i, question in enumerate(questions)}, n=3)
    held = grams_of(spell(text), 3)
    wanted = {}
    for i, question in enumerate(questions):
        grams = grams_of(spell(question), 3)
        if grams & held:
            wanted[str(i)] = len(grams & held) / len(grams)
    assert index.find(text) == pytest.approx(wanted)


def test_the_nearest_text_of_a_question_counts_and_short_ones_are_named():
    index = index_questions({"q": ["あいうえお", "あいうえお架空病薬"], "short": ["薬"]}, n=3)
    assert index.unchecked == ("short",)
    assert index.find("かき、あいうえお") == {"q": 1.0}
    assert index.find("架空病") == {"q": pytest.approx(1 / 7)}
    assert index.find("薬") == {}


def test_choices_are_known_however_they_are_listed():
    choices = ["安静を保つ", "薬を飲む", "水を飲む", "歩く", "眠る"]
    index = index_questions({"q": ["\n".join(["架空の病で最初にすることは", *choices])]})
    for labels in ("abcde", "１２３４５", "①②③④⑤", "アイウエオ"):
        listed = [f" {label}．{choice}" for label, choice in zip(labels, choices, strict=True)]
        assert index.find("\n".join(["問題: 架空の病で、最初にすることは", *listed])) == {"q": 1.0}


def make_text(rng, length):
    return "".join(rng.choices([chr(code) for code in range(0x4E00, 0x4E00 + 400)], k=length))


@pytest.mark.parametrize("length", [60, 3000])
def test_signatures_estimate_the_likeness(length):
    rng = random.Random(length)
    errors, found = [], 0
    for _ in range(150):
        text = make_text(rng, length)
        changed = text[: length // 2] + make_text(rng, length // 20) + text[length // 2 :]
        one, two = take_ngrams(text, 5), take_ngrams(changed, 5)
        signatures = np.stack([sign(one), sign(two)])
        errors.append(float(likeness(*signatures)) - jaccard(one, two))
        found += bool((band_keys(signatures)[0] == band_keys(signatures)[1]).any())
    assert abs(np.mean(errors)) < 0.015 and np.std(errors) < 0.06
    assert found > 145  # likeness here is about 0.9


def test_unlike_texts_share_no_key():
    rng = random.Random(0)
    signatures = np.stack([sign(take_ngrams(make_text(rng, 500), 5)) for _ in range(100)])
    assert signatures.shape == (100, BINS)
    assert len(np.unique(band_keys(signatures))) == band_keys(signatures).size
    assert not sign(take_ngrams("", 5)[:0]).any()


def test_the_real_exam_repeats_itself(igakuqa_dir):
    """113E2 (2019) was asked again as 116B10 (2022): the index finds it, and no template."""

    def whole(question):
        return "\n".join([question.text, *question.choices])

    questions = read_questions(igakuqa_dir)
    asked = {q.id: [whole(q)] for q in questions if q.year == 2022}
    index = index_questions(asked)
    assert len(index) == 400 and not index.unchecked
    shares = {q.id: index.find(whole(q)) for q in questions if q.year < 2022}
    copies = {
        (q, max(found, key=found.get))
        for q, found in shares.items()
        if max(found.values(), default=0) > 0.5
    }
    assert copies == {("113E2", "116B10"), ("113D21", "116A4")}
