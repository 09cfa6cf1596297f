"""Answers made here or elsewhere, judged by the key."""

import json

import pytest

from rpo_jax.data.ledger import Ledger
from rpo_jax.errors import UserError
from rpo_jax.exams.candidates import (
    judge,
    read_candidates,
    read_foreign,
    summarise,
    write_candidates,
)
from rpo_jax.exams.exam import find_exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.responses import Response

EXAM = find_exam("igakuqa")
ONE = Question("112A1", "正しいのはどれか。", ("甲", "乙", "丙", "丁", "戊"), ("b",))
TWO = Question("112A2", "正しいのはどれか。2つ選べ。", ("甲", "乙", "丙", "丁", "戊"), ("a", "c"))
QUESTIONS = {question.id: question for question in (ONE, TWO)}


def write(path, *records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return str(path)


def read(path, modes=("explain_first",)):
    ledger = Ledger("answers")
    return list(read_foreign([path], QUESTIONS, modes, EXAM, ledger)), ledger


@pytest.mark.parametrize(
    ("question", "text", "verdict", "answer", "went_on"),
    [
        (ONE, "乙が当てはまる。\n答え: b", "right", ("b",), False),
        (ONE, "甲が当てはまる。\n答え: a", "wrong", ("a",), False),
        (ONE, "答え: b\n問題: 次の問い", "right", ("b",), True),
        (ONE, "どれとも言えない。", "unclear", (), False),
        (ONE, "答え: aまたはb", "unclear", (), False),
        (TWO, "答え: c,a", "right", ("a", "c"), False),
        (TWO, "答え: a", "wrong", ("a",), False),
    ],
)
def test_the_key_judges(question, text, verdict, answer, went_on):
    response = Response(question.id, text, None, "eos", 7)
    found = judge(EXAM, question, "explain_first", "3", response)
    assert (found.verdict, found.answer, found.went_on) == (verdict, answer, went_on)
    assert (found.question, found.key, found.text) == (question.id, "3", text)
    assert (found.stop_reason, found.tokens) == ("eos", 7)


def test_answers_of_others_are_read_in_both_layouts(tmp_path):
    path = write(
        tmp_path / "gpt.jsonl",
        {"problem_id": "112A1", "prediction": "b", "explanation": "b"},
        {"id": "112A1", "text": "答え: c", "stop_reason": "length", "tokens": 9},
        {"id": "112A2", "text": "\na,c", "mode": "answer_only"},
        {"id": "999A9", "text": "答え: c"},
    )
    found, ledger = read(path)
    assert [(c.key, c.verdict) for c in found] == [("gpt:1", "right"), ("gpt:2", "wrong")]
    assert (found[1].stop_reason, found[1].tokens) == ("length", 9)
    assert {reason: drop.count for reason, drop in ledger.dropped.items()} == {
        "answer_only is not in data.sample.modes": 1,
        "of a question that is not trained on": 1,
    }
    assert "999A9" in ledger.dropped["of a question that is not trained on"].example
    assert f"{path}:4" in ledger.dropped["of a question that is not trained on"].example


def test_an_explanation_begins_behind_the_cue_of_its_prompt(tmp_path):
    texts = ("乙である。\n答え: b", "考察: 乙である。\n答え: b", "\n考察：\n考察: 甲。\n答え: a")
    path = write(tmp_path / "a.jsonl", *({"id": "112A1", "text": text} for text in texts))
    found, _ = read(path)
    assert [c.text for c in found] == [texts[0], texts[0], "甲。\n答え: a"]
    path = write(tmp_path / "b.jsonl", {"id": "112A1", "text": "考察の結果\n答え: b"})
    assert read(path)[0][0].text == "考察の結果\n答え: b"


@pytest.mark.parametrize(
    ("record", "modes", "message"),
    [
        ({"id": "112A1"}, 1, "no field 'text'"),
        ({"text": "b"}, 1, "no field 'id'"),
        ({"id": "112A1", "text": 3}, 1, "a string is wanted"),
        ({"id": "112A1", "text": "b", "stop_reason": "done"}, 1, "stop_reason is 'done'"),
        ({"id": "112A1", "text": "b"}, 2, "field 'mode' is None; answer_only or explain_first"),
        ({"id": "112A1", "text": "b", "mode": "guess"}, 1, "field 'mode' is 'guess'"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, record, modes, message):
    path = write(tmp_path / "a.jsonl", {"id": "112A1", "text": "", "mode": "answer_only"}, record)
    with pytest.raises(UserError, match=message) as error:
        read(path, ("answer_only", "explain_first")[:modes])
    assert f"{path}:2" in str(error.value)


def test_what_is_written_comes_back_and_adds_up(tmp_path):
    said = {"0": "答え: b", "1": "答え: a", "2": "分からない。", "3": "答え: b"}
    candidates = [
        judge(EXAM, ONE, "explain_first", key, Response(ONE.id, text, None, "eos"))
        for key, text in said.items()
    ]
    candidates.append(judge(EXAM, TWO, "explain_first", "0", Response(TWO.id, "答え: b")))
    write_candidates(tmp_path, candidates)
    assert list(read_candidates(tmp_path)) == candidates
    (mode,) = (found := summarise(candidates, 2))
    assert mode == "explain_first"
    assert found[mode] == {
        "answers": 5,
        "right": 0.4,
        "wrong": 0.4,
        "unclear": 0.2,
        "stop": 1.0,
        "questions": 2,
        "with_right": 1,
        "with_wrong": 2,
        "with_both": 1,
    }
    (tmp_path / "candidates.jsonl").write_text('{"question": "112A1", "answer": []}\n')
    with pytest.raises(UserError, match=r"candidates\.jsonl:1: damaged"):
        list(read_candidates(tmp_path))
