"""Explanations taken apart: what is recalled, judged and concluded, each on its own."""

import pytest

from rpo_jax.exams.fictional import SIZES, make_world
from rpo_jax.exams.fictional.anatomy import FACTS, follows, read_lines, take_apart
from rpo_jax.exams.igakuqa import Question


@pytest.fixture(scope="module")
def questions():
    items = make_world(3, SIZES["tiny"]).exam["test"]
    return [item.question for item in items if item.question.choices]


def spoil(questions, change):
    return take_apart(questions, [change(q.explanation) for q in questions])


def test_the_ground_truth_is_right_in_everything(questions):
    kinds = {question.category for question in questions}
    assert kinds == {"診断", "治療", "禁忌", "所見", "所見なし", "原因", "禁忌薬", "検査"}
    wanted = {"line": 1, "needed": 1, "wrong": 0, "other": 0, "none": 0, "verdict": 1, "follows": 1}
    assert spoil(questions, str) == wanted


def test_a_line_is_what_is_said_of_a_choice_and_the_verdict():
    text = "幃病の所見は斑、決め手は痛であるから、幃病と分かる。"
    text += "a 幃病の原因は貊液であり、当てはまる。b 囿反射、当てはまらない。cである。"
    lines = read_lines(text + "a 再びであり、当てはまらない。当てはまるのはaである。\n答え: a")
    assert {letter: (line.about, line.applies) for letter, line in lines.items()} == {
        "a": ("幃病の原因", True),
        "b": ("", False),
    }
    assert read_lines("") == {} and not follows("")


def test_the_end_is_held_against_the_verdicts_alone():
    judged = "a 甲の原因は乙であり、当てはまる。b 丙の原因は丁であり、当てはまらない。"
    for end, right in {
        "当てはまるのはaである。": True,
        "当てはまるのはaとbである。": False,
        "当てはまらないのはbである。": True,
        "当てはまらないのはaである。": False,
        "答え: a": False,
    }.items():
        assert follows(judged + end) is right, end


def test_verdicts_and_facts_are_told_apart(questions):
    turned = spoil(questions, lambda text: text.replace("当てはまらない。", "当てはまる。"))
    assert turned["needed"] == 1 and turned["verdict"] == 0.5  # one word for all: guessing
    without = spoil(questions, lambda text: text.replace("の", ""))
    assert without["none"] == without["line"] > 0.9 and without["verdict"] is None
    moved = spoil(questions, lambda text: text.replace("であり", "と甲であり"))
    assert moved["wrong"] == 1 and moved["follows"] == 1
    shifted = take_apart(questions[1:], [q.explanation for q in questions[:-1]])
    assert shifted["other"] > 0.5 and sum(shifted[fact] for fact in FACTS) == shifted["line"]


def test_the_order_of_signs_does_not_matter():
    question = Question("1A1", "", tuple("甲乙丙丁戊"), ("a",), explanation=_said("左、中、右"))
    assert take_apart([question], [_said("右、左、中")])["needed"] == 1
    assert take_apart([question], [_said("右、左")])["wrong"] == 1


def _said(signs):
    lines = [f"{letter} 甲の所見は{signs}であり、当てはまる。" for letter in "abcde"]
    return "".join(lines) + "当てはまるのはaである。"


def test_questions_for_a_number_are_passed_over():
    items = [item for part in make_world(3, SIZES["tiny"]).exam.values() for item in part]
    doses = [item.question for item in items if item.question.category == "用量"]
    assert doses
    assert set(take_apart(doses, [q.explanation for q in doses]).values()) == {0.0, None}
