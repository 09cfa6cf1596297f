"""Prompts, byte for byte."""

import json

import pytest

from rpo_jax.exams.extraction import extract
from rpo_jax.exams.igakuqa import Question, read_demonstrations, read_questions
from rpo_jax.exams.prompts import (
    ANSWER_ZERO_SHOT_V1,
    EXPLAIN_V1,
    EXPLAIN_ZERO_SHOT_V1,
    FORMATS,
    NAME_ZERO_SHOT_V1,
    OFFICIAL_COMPLETION_V1,
    OFFICIAL_V1,
)

ONE = Question("1A1", "丸いのは。", ("玉", "箱"), ("a",), explanation="玉は丸い。")
TWO = Question("1A2", "角は。2つ選べ。", ("玉", "箱", "本"), ("b", "c"), explanation="箱と本。")
NUMBER = Question("1A3", "1足す1は。", (), ("2",), explanation="足すと2。")
SHOTS = (ONE, TWO, NUMBER)


def test_official_prompt_as_text():
    assert OFFICIAL_V1.render(TWO, SHOTS) == (
        "医師国家試験を解きます。\n"
        "問題: 丸いのは。\na: 玉\nb: 箱\n"
        "必ずa,b,c,d,eの中からちょうど1個選んでください。\n答え:\na\n"
        "問題: 角は。2つ選べ。\na: 玉\nb: 箱\nc: 本\n"
        "必ずa,b,c,d,eの中からちょうど2個選んでください。\n答え:\nb,c\n"
        "問題: 1足す1は。\n2\n"
        "問題: 角は。2つ選べ。\na: 玉\nb: 箱\nc: 本\n"
        "必ずa,b,c,d,eの中からちょうど2個選んでください。\n答え:"
    )


def test_official_prompt_as_messages():
    messages = OFFICIAL_V1.messages(NUMBER, SHOTS)
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert messages[0]["content"] == "医師国家試験を解きます。"
    assert messages[3]["content"].endswith("ちょうど2個選んでください。\n答え:")
    assert [m["content"] for m in messages if m["role"] == "assistant"] == ["a", "b,c", "2"]
    assert messages[-1]["content"] == "問題: 1足す1は。"


def test_completion_prompt_differs_by_the_system_line_only():
    text = OFFICIAL_COMPLETION_V1.render(ONE, SHOTS)
    assert OFFICIAL_V1.render(ONE, SHOTS) == "医師国家試験を解きます。\n" + text


def test_explain_first_prompt():
    prompt = EXPLAIN_ZERO_SHOT_V1.render(TWO)
    assert prompt.endswith("ちょうど2個選んでください。\n考察:")
    assert EXPLAIN_ZERO_SHOT_V1.target(TWO, ("b", "c"), "箱。") == "箱。\n答え: b,c"
    assert EXPLAIN_ZERO_SHOT_V1.render(NUMBER).endswith("問題: 1足す1は。\n考察:")


def test_a_prompt_for_names_asks_for_them_and_is_answered_by_them():
    prompt = NAME_ZERO_SHOT_V1.render(TWO)
    assert "記号ではなく、語句で" in prompt and prompt.endswith("答え:")
    for question, letters in ((ONE, ("a",)), (TWO, ("b", "c"))):
        named = NAME_ZERO_SHOT_V1.target(question, letters)
        assert named == {"1A1": "\n玉", "1A2": "\n箱、本"}[question.id]
        assert extract(question, named).answer == letters
    assert NAME_ZERO_SHOT_V1.target(NUMBER, ("2",)) == "\n2"


@pytest.mark.parametrize("name", ["OFFICIAL_V1", "OFFICIAL_COMPLETION_V1", "EXPLAIN_V1"])
def test_prompt_and_response_read_like_one_more_demonstration(name):
    format_ = FORMATS[name]
    for question in SHOTS:
        whole = format_.render(question, SHOTS) + format_.target(
            question, question.answers, question.explanation
        )
        shown = format_.render(ONE, (question, question, question))
        assert whole.splitlines()[-1] in shown
        # What follows the last demonstration is exactly the first demonstration's text.
        demonstration = whole[whole.rindex("問題: ") :]
        assert shown.count(demonstration + "\n") == 3


def test_targets_are_checked():
    with pytest.raises(ValueError, match=r"1A1.*\['c'\].*\['a', 'b'\]"):
        OFFICIAL_V1.target(ONE, ("c",))
    with pytest.raises(ValueError, match="1A1"):
        OFFICIAL_V1.target(ONE, ())
    with pytest.raises(ValueError, match="EXPLAIN_V1 needs an explanation"):
        EXPLAIN_V1.target(ONE, ("a",))


def test_number_of_demonstrations_is_part_of_the_name():
    with pytest.raises(ValueError, match="OFFICIAL_V1 takes 3 demonstrations, got 2"):
        OFFICIAL_V1.render(ONE, SHOTS[:2])
    with pytest.raises(ValueError, match="takes 0 demonstrations, got 3"):
        ANSWER_ZERO_SHOT_V1.messages(ONE, SHOTS)


def test_names_are_their_keys():
    assert all(name == format_.name for name, format_ in FORMATS.items())


def test_official_prompt_on_the_real_exam(igakuqa_dir):
    def lay_out(record: dict, answer: str | None) -> str:
        text = "問題: " + record["problem_text"]
        for letter, choice in zip("abcdefgh", record["choices"], strict=False):
            text += f"\n{letter}: {choice}"
        if record["choices"]:
            count = len(record["answer"])
            text += f"\n必ずa,b,c,d,eの中からちょうど{count}個選んでください。\n答え:"
        return text if answer is None else text + "\n" + answer

    with (igakuqa_dir / "prompt.jsonl").open(encoding="utf-8") as file:
        shots = [json.loads(line) for line in file]
    raw = {}
    for path in sorted(igakuqa_dir.glob("20*/???-?.jsonl")):
        with path.open(encoding="utf-8") as file:
            raw |= {record["problem_id"]: record for record in map(json.loads, file)}
    head = "\n".join(
        ["医師国家試験を解きます。", *(lay_out(s, ",".join(s["answer"])) for s in shots)]
    )
    demonstrations = read_demonstrations(igakuqa_dir)
    for question in read_questions(igakuqa_dir):
        expected = head + "\n" + lay_out(raw[question.id], None)
        assert OFFICIAL_V1.render(question, demonstrations) == expected
