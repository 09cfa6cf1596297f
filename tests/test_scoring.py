"""Scores: the published rule with its oddities, extracted answers, groups, and the command."""

import dataclasses
import json
from pathlib import Path

import pytest

from rpo_jax import cli
from rpo_jax.errors import UserError
from rpo_jax.evaluate import main
from rpo_jax.exams.exam import Exam, find_exam, list_exams
from rpo_jax.exams.extraction import question_slots
from rpo_jax.exams.igakuqa import Question, write_questions
from rpo_jax.exams.numbers import fill
from rpo_jax.exams.responses import Response, predict, read_responses, to_record
from rpo_jax.exams.scoring import (
    chose_prohibited,
    is_officially_right,
    is_right,
    mark,
    mark_all,
    score,
)

IGAKUQA = find_exam("igakuqa")
FIVE = ("い", "ろ", "は", "に", "ほ")
TWO = Question("112A1", "どれか。2つ選べ。", FIVE, ("a", "c"), year=2018, section="A")
TOTALS = {2018: 499, 2019: 496, 2020: 496, 2021: 500, 2022: 494}


def gold(question: Question) -> str:
    """What the published rule wants to hear."""
    return ",".join(question.accepted[0])


def write_lines(path: Path, records: list[dict]) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path


# The published rule.


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("a,c", True),
        ("c,a", True),
        ("a, c", False),  # nothing is stripped
        (" a,c", False),
        ("a,c\n", False),
        ("a", False),  # no part marks
        ("a,b,c", False),
        ("a,c,c", False),
        ("A,C", False),
        ("ａ,ｃ", False),
        ("a、c", False),
        ("ac", False),
        ("", False),
        ("答え: a,c", False),
    ],
)
def test_the_published_rule_is_exact(prediction, right):
    assert is_officially_right(IGAKUQA, TWO, prediction) is right


def test_a_withdrawn_question_is_right_whatever_is_said():
    always = dataclasses.replace(TWO, id="116A71")
    for text in ("b", "", "わかりません"):
        marked = mark(IGAKUQA, always, Response("116A71", text))
        assert marked.official and marked.extracted
    assert not is_officially_right(find_exam("fictional"), always, "b")


def test_an_alternative_gold_takes_either_letter():
    either = dataclasses.replace(TWO, id="112B30", answers=("a or d",))
    for said, right in (("a", True), ("d", True), ("a,d", False), ("b", False), ("a or d", True)):
        assert is_officially_right(IGAKUQA, either, said) is right
    assert is_right(IGAKUQA, either, ("a",)) and is_right(IGAKUQA, either, ("d",))
    assert not is_right(IGAKUQA, either, ("a", "d"))


@pytest.mark.parametrize(
    ("template", "published", "meant", "wrong"),
    [
        ("解答：①.②g/日", "21", "2.1", "2.2"),
        ("解答：①.②", "04", "0.4", "4"),
        ("解答：①②.③/人口1,000対", "100", "10.0", "1.00"),
        ("解答：①.②", "8.5", "8.5", "85"),
        ("解答：①②Torr", "26", "26", "2.6"),
        ("解答：1, ①②③ kcal", "130", "1130", "13"),
    ],
)
def test_a_number_is_compared_as_a_string_officially_and_by_its_value_when_extracted(
    template, published, meant, wrong
):
    question = Question("116B50", f"値を求めよ。{template}", (), (published,))
    assert fill(question_slots(question), published.replace(".", "")) == meant
    assert is_officially_right(IGAKUQA, question, published)
    assert is_officially_right(IGAKUQA, question, meant) is (meant == published)
    for said, right in ((published, True), (meant, True), (wrong, False)):
        assert mark(IGAKUQA, question, Response("116B50", f"答え: {said}")).extracted is right


def test_a_question_without_points_counts_as_a_question_only():
    withdrawn = dataclasses.replace(TWO, points=0)
    found = score(IGAKUQA, mark_all(IGAKUQA, [withdrawn], [Response("112A1", "a,c")]))["official"]
    assert (found["points"], found["total"], found["right"], found["questions"]) == (0, 0, 1, 1)


def test_the_published_pipeline_strips_completions_before_the_rule():
    assert predict("\nＡ，ｃ ") == "a,c"
    assert predict("①") == "①"
    assert is_officially_right(IGAKUQA, TWO, predict("\nＡ，ｃ "))


@pytest.mark.parametrize("year", TOTALS)
def test_gold_gets_every_point_of_the_real_exam(igakuqa_dir, year):
    questions = IGAKUQA.read(igakuqa_dir, [year])
    responses = [Response(question.id, gold(question)) for question in questions]
    found = score(IGAKUQA, mark_all(IGAKUQA, questions, responses))
    for rule in ("official", "extracted"):
        assert found[rule]["points"] == found[rule]["total"] == TOTALS[year]
        assert found[rule]["right"] == found[rule]["questions"] == 400
    assert found["rates"]["parse"] == 1.0
    assert found["pass"][str(year)]["passed"] is True
    assert found["pass"][str(year)]["prohibited"]["chosen"] == 0


def test_the_rule_on_the_real_exam_equals_its_definition_on_the_raw_files(igakuqa_dir):
    said = ["a", "b,d", "e", "a, c", "c", "1.2", "d"]
    for year, total in TOTALS.items():
        expected = seen = 0
        questions = {question.id: question for question in IGAKUQA.read(igakuqa_dir, [year])}
        for path in sorted(igakuqa_dir.glob(f"{year}/???-?.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                id_, points = record["problem_id"], int(record["points"])
                prediction = said[seen % len(said)]
                right = sorted(prediction.split(",")) == sorted(record["answer"])
                right |= id_ == "116A71" or (id_ == "112B30" and prediction in ("a", "d"))
                expected += points * right
                assert is_officially_right(IGAKUQA, questions[id_], prediction) == right
                seen += 1
        responses = [Response(id_, said[place % len(said)]) for place, id_ in enumerate(questions)]
        found = score(IGAKUQA, mark_all(IGAKUQA, list(questions.values()), responses))["official"]
        assert (found["points"], found["total"], seen) == (expected, total, 400)


# Extracted answers, groups, verdicts.


def small_exam() -> list[Question]:
    def one(number: int, section: str, points: int, answers: tuple[str, ...] = ("a",), **more):
        fields = {"category": "総論", "kinki": ("e",), **more}
        id_ = f"112{section}{number}"
        return Question(
            id_, f"{id_}のどれか。", FIVE, answers, points, year=2018, section=section, **fields
        )

    return [
        one(1, "A", 1),
        one(2, "A", 1, ("a", "b"), category="外科", text_only=False),
        one(1, "B", 3),
        one(2, "B", 1),
        one(3, "B", 0),
    ]


def score_texts(exam: Exam, *texts: str) -> dict:
    questions = small_exam()
    responses = [Response(q.id, text) for q, text in zip(questions, texts, strict=True)]
    return score(exam, mark_all(exam, questions, responses))


def test_groups_add_up():
    found = score_texts(IGAKUQA, "a", "考察。\n答え: aとb", "b", "答え: a", "")
    assert found["official"]["points"] == 1
    assert found["extracted"]["points"] == 3
    for groups in found["by"].values():
        for rule in ("official", "extracted"):
            for name in ("points", "total", "right", "questions"):
                assert sum(group[rule][name] for group in groups.values()) == found[rule][name]
    assert set(found["by"]["section"]) == {"A", "B"}
    assert found["by"]["category"]["外科"]["extracted"]["points"] == 1
    assert found["by"]["answers"]["2"]["extracted"]["points"] == 1
    assert found["by"]["text_only"]["with a figure"]["extracted"]["total"] == 1
    assert found["rates"]["parse"] == 0.8
    assert found["rates"]["found"] == {"alone": 2, "label": 2, "nothing": 1}


def test_required_sections_pass_from_eighty_percent():
    exam = dataclasses.replace(IGAKUQA, general_pass={2018: 2})
    passed = score_texts(exam, "a", "a,b", "a", "a", "a")["pass"]["2018"]
    assert passed["required"]["passed"] and passed["general"]["passed"] and passed["passed"]
    failed = score_texts(exam, "a", "a,b", "a", "b", "a")["pass"]["2018"]  # 3 of 4 is 75 %
    assert not failed["required"]["passed"] and failed["passed"] is False
    failed = score_texts(exam, "a", "a", "a", "a", "a")["pass"]["2018"]
    assert not failed["general"]["passed"] and failed["passed"] is False
    unknown = score_texts(dataclasses.replace(exam, general_pass={}), "a", "a", "a", "a", "a")
    assert unknown["pass"]["2018"]["passed"] is None
    exact = dataclasses.replace(exam, required_share=0.75)
    assert score_texts(exact, "a", "a,b", "a", "b", "a")["pass"]["2018"]["required"]["passed"]


def test_four_prohibited_choices_fail():
    exam = dataclasses.replace(IGAKUQA, required_sections="")
    three = score_texts(exam, "e", "a,e", "答え: e", "a", "a")["pass"]["2018"]
    assert three["prohibited"]["ids"] == ["112A1", "112A2", "112B1"] and three["passed"]
    four = score_texts(exam, "e", "a,e", "e", "e", "a")["pass"]["2018"]
    assert four["prohibited"]["chosen"] == 4 and four["passed"] is False
    assert not chose_prohibited(mark(exam, small_exam()[0], Response("112A1", "e も a も")))


def test_stops_are_counted_where_they_are_known():
    questions = small_exam()
    responses = [Response(q.id, "答え: a", None, "eos", 4) for q in questions]
    responses[0] = Response("112A1", "答え: a\n問題: 次", None, "length", 9)
    found = score(IGAKUQA, mark_all(IGAKUQA, questions, responses))
    assert found["rates"]["truncation"] == 0.2 and found["rates"]["stop"] == 0.8
    assert found["rates"]["run_on"] == 0.2
    assert found["lengths"]["tokens"] == {"mean": 5.0, "median": 4, "longest": 9}
    unknown = score_texts(IGAKUQA, *["a"] * 5)
    assert unknown["rates"]["stop"] is None and unknown["lengths"]["tokens"] is None


# The command.


def run(capsys, *arguments: str) -> dict:
    with cli.exit_on_error():
        main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refuse(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop, cli.exit_on_error():
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def exam_dir(tmp_path) -> Path:
    write_questions(tmp_path / "exam", small_exam())
    return tmp_path / "exam"


def arguments(exam_dir: Path, file: Path) -> list[str]:
    return [
        "--score",
        str(file),
        "--exam",
        "igakuqa",
        "--exam_dir",
        str(exam_dir),
        "--year",
        "2018",
    ]


def test_plain_and_published_files_score_alike(capsys, tmp_path, exam_dir):
    texts = dict(zip([q.id for q in small_exam()], ["a", "a,b", "b", "a", "c"], strict=True))
    plain = write_lines(tmp_path / "plain.jsonl", [{"id": i, "text": t} for i, t in texts.items()])
    published = write_lines(
        tmp_path / "published.jsonl",
        [{"problem_id": i, "prediction": t, "explanation": t} for i, t in texts.items()],
    )
    one, other = (run(capsys, *arguments(exam_dir, file)) for file in (plain, published))
    assert one["official"]["points"] == 3 and one["official"]["total"] == 6
    assert {**one, "files": None} == {**other, "files": None}
    assert one["extracted"]["points"] == 3 and 0 <= one["rates"]["parse"] <= 1


def test_a_prediction_beside_a_text_is_what_the_published_rule_sees(capsys, tmp_path, exam_dir):
    lines = [{"id": q.id, "text": "\na", "prediction": "a"} for q in small_exam()]
    found = run(capsys, *arguments(exam_dir, write_lines(tmp_path / "both.jsonl", lines)))
    assert found["official"]["points"] == found["extracted"]["points"] == 5
    lines = [{"id": q.id, "text": "\na"} for q in small_exam()]
    found = run(capsys, *arguments(exam_dir, write_lines(tmp_path / "text.jsonl", lines)))
    assert (found["official"]["points"], found["extracted"]["points"]) == (0, 5)


def test_the_table_shows_points_and_verdict(capsys, tmp_path, exam_dir):
    lines = [{"id": q.id, "text": gold(q)} for q in small_exam()]
    with cli.exit_on_error():
        main(arguments(exam_dir, write_lines(tmp_path / "a.jsonl", lines)))
    shown = capsys.readouterr().out
    for part in (
        "igakuqa 2018: 5 questions",
        "official",
        "100.0%",
        "外科",
        "failed",
        "parse 100.0%",
        "official: points by the published rule",
        "parse: texts with an answer",
    ):
        assert part in shown
    legend = shown.splitlines()[-1]
    for name in ("parse", "went-on", "run-on", "stop", "truncation", "found"):
        assert f"{name}: " in legend
    assert "vote" not in shown


def test_files_are_looked_for_before_the_exam(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("IGAKUQA_DIR", raising=False)
    assert "--score: no file matches" in refuse(capsys, "--score", str(tmp_path / "no.jsonl"))


GOOD = [{"id": q.id, "text": "a"} for q in small_exam()]
BAD_FILES = {
    "unknown id": ([*GOOD, {"id": "112A99", "text": "a"}], ["file.jsonl:6", "'112A99'", "--year"]),
    "duplicate": ([*GOOD, GOOD[1]], ["file.jsonl:6", "'112A2'", "before", "file.jsonl:2"]),
    "missing": (GOOD[:3], ["2 of 5", "112B2, 112B3", "--year"]),
    "no text": ([{"id": "112A1"}, *GOOD], ["file.jsonl:1", "'text'"]),
    "text a number": ([{"id": "112A1", "text": 5}], ["file.jsonl:1", "'text'", "string"]),
    "no id": ([{"text": "a"}], ["file.jsonl:1", "'id'"]),
    "no prediction": ([{"problem_id": "112A1"}], ["file.jsonl:1", "'prediction'"]),
    "stop reason": (
        [{"id": "112A1", "text": "a", "stop_reason": "bored"}],
        ["file.jsonl:1", "bored", "eos, stop, length"],
    ),
    "tokens": ([{"id": "112A1", "text": "a", "tokens": -1}], ["file.jsonl:1", "tokens", "-1"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_with_line_and_reason(capsys, tmp_path, exam_dir, name):
    lines, expected = BAD_FILES[name]
    told = refuse(capsys, *arguments(exam_dir, write_lines(tmp_path / "file.jsonl", lines)))
    for part in expected:
        assert part in told


def test_broken_json_and_missing_places_are_named(capsys, tmp_path, exam_dir, monkeypatch):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "112A1", "text": "a"}\n{"id": \n', encoding="utf-8")
    assert "broken.jsonl:2: not a JSON object" in refuse(capsys, *arguments(exam_dir, broken))
    file = write_lines(tmp_path / "good.jsonl", GOOD)
    assert "no file matches" in refuse(capsys, *arguments(exam_dir, tmp_path / "none.jsonl"))
    assert "nowhere does not exist" in refuse(capsys, *arguments(tmp_path / "nowhere", file))
    good = arguments(exam_dir, file)
    assert "no folder for [2019]" in refuse(capsys, *good[:-1], "2019")
    assert "'next'" in refuse(capsys, *good[:-1], "next")
    assert "known: fictional, igakuqa" in refuse(capsys, "--score", str(file), "--exam", "bar")
    monkeypatch.delenv("IGAKUQA_DIR", raising=False)
    assert "--exam_dir, or set IGAKUQA_DIR" in refuse(capsys, "--score", str(file))
    assert "--score FILE and --report FOLDER is wanted" in refuse(capsys, "--json")


def test_an_exam_is_one_file():
    assert list_exams() == ["fictional", "igakuqa"]
    assert sum(IGAKUQA.published["Preferred-MedLLM-Qwen-72B"].values()) == 2156
    assert sum(IGAKUQA.published["Qwen2.5-72B"].values()) == 1992
    with pytest.raises(UserError, match=r"no such exam; known: fictional, igakuqa"):
        find_exam("../igakuqa")


def test_responses_survive_a_round_trip(tmp_path):
    responses = [Response(q.id, "text\n", "text", "length", 7) for q in small_exam()]
    file = write_lines(tmp_path / "r.jsonl", [to_record(response) for response in responses])
    assert read_responses([str(file)], small_exam()) == responses
