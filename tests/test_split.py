"""What of an exam may be trained on: no evaluation question, nor its like, nor half of a pair."""

from dataclasses import replace

import pytest

from rpo_jax.exams.igakuqa import Question, read_questions
from rpo_jax.exams.split import find_leaks, hold_out


def ask(id_: str, text: str, *choices: str) -> Question:
    return Question(id=id_, text=text, choices=choices, answers=("a",))


@pytest.fixture(scope="module")
def exam(igakuqa_dir):
    return {year: read_questions(igakuqa_dir, [year]) for year in (2018, 2019, 2020, 2021, 2022)}


def test_the_real_exam_repeats_three_of_its_questions(exam):
    taught = [question for year in (2018, 2019, 2020, 2021) for question in exam[year]]
    leaks = find_leaks(taught, exam[2022], 0.5)
    assert {id_: near for id_, (near, _) in leaks.items()} == {
        "113E2": "116B10",  # the same, with other years in one choice
        "113D21": "116A4",  # the same five drugs
        "114F50": "116A24",  # the same case, other choices
    }
    assert leaks["113E2"][1] > 0.85
    assert set(find_leaks(taught, exam[2022], 0.8)) == {"113E2"}


def test_a_question_is_found_however_it_is_spelt_and_wherever_it_stands():
    examined = [ask("1A1", "高血圧症の治療薬として誤っているのはどれか。", "利尿薬", "β遮断薬")]
    same = "高血圧症の治療薬として 誤っているのは どれか"
    taught = [
        ask("2A1", same, "利尿薬", "Β遮断薬"),
        ask("2A2", f"次の文を読み答えよ。{same}。理由も述べよ。", "別の薬"),
        ask("2A3", "低血圧症の治療薬として正しいのはどれか。", "昇圧薬"),
    ]
    leaks = find_leaks(taught, examined, 0.5)
    assert set(leaks) == {"2A1", "2A2"} and leaks["2A1"] == ("1A1", 1.0)
    assert find_leaks(taught, [], 0.5) == {}


def test_held_out_questions_follow_from_the_questions_alone(exam):
    questions = exam[2018]
    held = hold_out(questions, 0.1, 0.5)
    assert len(held) == 40
    assert hold_out(questions[::-1], 0.1, 0.5) == held
    renamed = [replace(question, answers=()) for question in questions]
    assert hold_out(renamed, 0.1, 0.5) == held
    assert len(hold_out(questions, 0.5, 0.5)) == 200


def test_questions_that_are_alike_are_held_out_together():
    case = "四十歳の男性。昨夜からの激しい腹痛を主訴に来院した。体温三十八度、脈拍百。"
    series = [ask(f"1A{n}", f"{case}検査{n}はどれか。") for n in range(1, 5)]
    others = [ask(f"1B{n}", f"{n * 'あ'}い{n * 'う'}え{n * 'お'}は何か。") for n in range(1, 17)]
    sides = set()
    for share in (0.1, 0.3, 0.5, 0.7):
        held = hold_out([*series, *others], share, 0.5)
        inside = {question.id for question in series} & held
        assert len(inside) in (0, 4)
        assert 0 < len(held) <= share * 20
        sides.add(len(inside))
    assert sides == {0, 4}
    assert hold_out(series, 0.1, 0.5) == {"1A1", "1A2", "1A3", "1A4"}  # there is no smaller part
