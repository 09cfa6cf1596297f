"""The IgakuQA reader and writer: the real exam where it is at hand, and every kind of bad file."""

import collections
import json
import shutil
from pathlib import Path

import pytest

from rpo_jax.errors import UserError
from rpo_jax.exams.igakuqa import (
    Question,
    read_demonstrations,
    read_questions,
    write_questions,
)

GOOD = {
    "problem_id": "112A1",
    "problem_text": "どれか。",
    "choices": ["い", "ろ", "は", "に", "ほ"],
    "text_only": True,
    "answer": ["b"],
    "points": "1",
}


def write_exam(root: Path, *records: object, metadata: tuple[object, ...] = ()) -> Path:
    folder = root / "2018"
    folder.mkdir(parents=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    (folder / "112-A.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if metadata:
        text = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in metadata)
        (folder / "112-A_metadata.jsonl").write_text(text, encoding="utf-8")
    return root


def test_real_exam_has_the_published_counts(igakuqa_dir):
    questions = read_questions(igakuqa_dir)
    assert len(questions) == 2000
    assert sum(q.text_only for q in questions) == 1471
    # The published 1,702 single answers include the 12 numeric ones and "a or d".
    assert collections.Counter(len(q.answers) for q in questions) == {1: 1702, 2: 243, 3: 55}
    assert sum(q.is_numeric for q in questions) == 12
    assert sum(q.points == 0 for q in questions) == 11
    points = collections.Counter()
    for question in questions:
        points[question.year] += question.points
    assert points == {2018: 499, 2019: 496, 2020: 496, 2021: 500, 2022: 494}
    assert {q.points for q in questions if q.section not in "BE"} <= {0, 1}


def test_real_exam_oddities_are_normalised(igakuqa_dir):
    by_id = {q.id: q for q in read_questions(igakuqa_dir)}
    assert by_id["112B30"].answers == ("a or d",)
    assert by_id["112B30"].accepted == (("a",), ("d",))
    assert by_id["112A1"].accepted == (by_id["112A1"].answers,)
    numeric = [by_id[i].answers[0] for i in ("116B50", "116F74", "114C75")]
    assert numeric == ["21", "04", "100"]
    assert by_id["112A27"].kinki == ("c", "d", "e")  # one entry "cde"
    assert by_id["112F66"].kinki == ("b",)  # full-width
    assert by_id["115E28"].kinki == ("d", "e")  # leading space
    assert len(by_id["113F83"].letters) == 8


def test_real_exam_years_can_be_chosen_and_demonstrations_keep_file_order(igakuqa_dir):
    questions = read_questions(igakuqa_dir, years=[2022])
    assert len(questions) == 400
    assert {q.year for q in questions} == {2022}
    shown = read_demonstrations(igakuqa_dir)
    assert [(d.id, d.answers) for d in shown] == [
        ("100E5", ("e",)),
        ("100A60", ("a", "b")),
        ("100A1", ("c",)),
    ]
    assert all(d.explanation and d.year is None for d in shown)


def test_real_exam_survives_a_round_trip(tmp_path, igakuqa_dir):
    questions, shown = read_questions(igakuqa_dir), read_demonstrations(igakuqa_dir)
    write_questions(tmp_path, questions, shown)
    assert read_questions(tmp_path) == questions
    assert read_demonstrations(tmp_path) == shown


def test_round_trip_keeps_every_field(tmp_path):
    question = Question(
        "112B7", "何か。", ("い", "ろ"), ("a", "b"), 3, False, 2018, "B", "総論", ("a",), "考え"
    )
    numeric = Question("112B8", "いくつか。", (), ("1.2",), 1, True, 2018, "B")
    write_questions(tmp_path, [question, numeric])
    assert read_questions(tmp_path) == [question, numeric]


def test_metadata_is_optional(tmp_path):
    (question,) = read_questions(write_exam(tmp_path, GOOD))
    assert (question.category, question.kinki, question.section) == ("", (), "A")


BAD_LINES = {
    "broken JSON": ('{"problem_id": ', ["not a JSON line"]),
    "not an object": ("[1]", ["list", "a JSON object"]),
    "missing key": ({k: v for k, v in GOOD.items() if k != "answer"}, ["'answer'", "required"]),
    "unknown key": ({**GOOD, "anser": 1}, ["'anser'", "unknown", "problem_text"]),
    "letter beyond choices": ({**GOOD, "answer": ["f"]}, ["'answer'", "['f']", "a-e"]),
    "repeated letter": ({**GOOD, "answer": ["a", "a"]}, ["'answer'", "different letters"]),
    "joined letters": ({**GOOD, "answer": ["ab"]}, ["'answer'", "['ab']"]),
    "no answer": ({**GOOD, "answer": []}, ["'answer'", "[]"]),
    "alternative beyond choices": ({**GOOD, "answer": ["a or g"]}, ["'answer'", "a or g"]),
    "answer not a list": ({**GOOD, "answer": "a"}, ["'answer'", "a list of strings"]),
    "letter without choices": ({**GOOD, "choices": []}, ["'answer'", "['b']", "number"]),
    "points not digits": ({**GOOD, "points": "1.5"}, ["'points'", "'1.5'", "digits"]),
    "points a number": ({**GOOD, "points": 1}, ["'points'", "1", "str"]),
    "text_only a string": ({**GOOD, "text_only": "yes"}, ["'text_only'", "'yes'", "bool"]),
    "empty text": ({**GOOD, "problem_text": " "}, ["'problem_text'", "not empty"]),
    "id of another file": ({**GOOD, "problem_id": "112B1"}, ["'problem_id'", "112B1", "112A"]),
    "id without a section": ({**GOOD, "problem_id": "112"}, ["'problem_id'", "like 112A1"]),
    "duplicate id": (GOOD | {"problem_id": "112A9"}, ["'problem_id'", "112A9", "not used before"]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named_with_file_line_field_and_what_is_allowed(tmp_path, name):
    line, expected = BAD_LINES[name]
    root = write_exam(tmp_path, GOOD | {"problem_id": "112A9"}, line)
    with pytest.raises(UserError) as error:
        read_questions(root)
    for part in ["112-A.jsonl:2", *expected]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"problem_id": "112A1", "kinki": ["z"]}, ["'kinki'", "['z']", "abcde"]),
        ({"problem_id": "112A1", "kinki": "a"}, ["'kinki'", "a list of strings"]),
        ({"problem_id": "112A1", "kinky": []}, ["'kinky'", "unknown"]),
        ({"problem_id": "112A1", "category": 3}, ["'category'", "a string"]),
        ({"problem_id": "112A2"}, ["'problem_id'", "112A2", "an id of 112-A.jsonl"]),
    ],
)
def test_bad_metadata_is_named(tmp_path, metadata, expected):
    root = write_exam(tmp_path, GOOD, metadata=(metadata,))
    with pytest.raises(UserError) as error:
        read_questions(root)
    for part in ["112-A_metadata.jsonl:1", *expected]:
        assert part in str(error.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    root = write_exam(tmp_path, GOOD)
    with (root / "2018" / "112-A.jsonl").open("ab") as file:
        file.write(b'{"problem_id": "\xff"}\n')
    with pytest.raises(UserError, match=r"112-A.jsonl:2: not a JSON line"):
        read_questions(root)


def test_a_clone_of_the_release_has_its_demonstrations_beside_the_data(tmp_path, igakuqa_dir):
    (tmp_path / "data").mkdir()
    released = tmp_path / "scripts/prompts/prompt.jsonl"
    released.parent.mkdir(parents=True)
    shutil.copy(igakuqa_dir / "prompt.jsonl", released)
    assert read_demonstrations(tmp_path / "data") == read_demonstrations(igakuqa_dir)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_questions(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no folder for \[2019\]; it has \[2018\]"):
        read_questions(write_exam(tmp_path, GOOD), years=[2019])
    with pytest.raises(UserError, match=r"prompt\.jsonl does not exist, nor .*scripts/prompts"):
        read_demonstrations(tmp_path)
    (tmp_path / "2020").mkdir()
    with pytest.raises(UserError, match="2020 holds no file"):
        read_questions(tmp_path)


def test_writer_refuses_an_id_that_the_reader_would_refuse(tmp_path):
    question = Question("112A1", "何か。", ("い", "ろ"), ("a",), year=2019, section="A")
    with pytest.raises(ValueError, match=r"112A1.*2019.*113A"):
        write_questions(tmp_path, [question])
    assert not list(tmp_path.iterdir())
