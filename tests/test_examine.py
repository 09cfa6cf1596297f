"""A model takes an exam through the command: any mesh, any interruption, the same report."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tqdm import tqdm

from rpo_jax import cli
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.evaluate import main, parse_plan
from rpo_jax.examine import RunningScore
from rpo_jax.exams.asking import Ask, find_prompt, read_answers
from rpo_jax.exams.candidate import has_one_letter
from rpo_jax.exams.exam import Exam, find_exam
from rpo_jax.exams.igakuqa import read_questions
from rpo_jax.exams.responses import Response, predict
from rpo_jax.model.qwen2 import forward, head_table
from rpo_jax.training.opening import open_model
from tests.processes import REPO, finish
from tests.sittings import YEAR, make_exam, make_model

WHOLE = jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module")
def model(make_once) -> Path:
    return make_once("exam_model", make_model)


@pytest.fixture(scope="module")
def exam_dir(tmp_path_factory) -> Path:
    return make_exam(tmp_path_factory.mktemp("exam"))[0]


@pytest.fixture
def lettered(monkeypatch) -> Exam:
    """The world's exam where letters answer it, as they do any other exam."""
    exam = replace(find_exam("fictional"), names=False)
    monkeypatch.setattr("rpo_jax.exams.known.fictional.EXAM", exam)
    return exam


def arguments(model: Path, exam_dir: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--checkpoint", str(model), "--exam", "fictional", "--exam_dir", str(exam_dir)),
        *("--out", str(out), "--limit", "6", "--answer_tokens", "6", "--explain_tokens", "24"),
        *more,
    ]


def run(capsys, *given: str) -> dict:
    with cli.exit_on_error():
        main([*given, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refuse(capsys, *given: str) -> str:
    with pytest.raises(SystemExit) as stop, cli.exit_on_error():
        main(list(given))
    assert stop.value.code == 2
    return capsys.readouterr().err


def read_all(out: Path) -> dict[str, list]:
    return {path.name: sorted(path.read_bytes().splitlines()) for path in out.glob("responses/*")}


@pytest.mark.full
def test_one_command_takes_the_exam_and_a_break_changes_nothing(
    capsys, tmp_path, model, exam_dir, lettered
):
    drawn = ["--temperature", "1", "--seeds", "0,1", "--mesh", "data=2,tensor=2,fsdp=2"]
    found = run(capsys, *arguments(model, exam_dir, tmp_path / "a", *drawn))
    (one,) = found["models"]
    assert set(one["modes"]) == {"answer_only", "explain_first"}
    assert set(one["modes"]["answer_only"]["seeds"]) == {"0", "1"}
    assert one["comparison"]["points"]["low"] <= one["comparison"]["points"]["high"]
    assert found["questions"]["asked"] == 6 and one["likelihood"]["questions"] <= 6
    assert (tmp_path / "a" / "report.html").is_file()
    whole = read_all(tmp_path / "a")
    assert all(len(lines) == 6 for lines in whole.values()) and len(whole) == 4
    assert whole["answer_only-0.jsonl"] != whole["answer_only-1.jsonl"]

    # Answers lost to a kill come back the same, on another mesh too; the others are not touched.
    path = tmp_path / "a" / "responses" / "explain_first-1.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:2]
    path.write_bytes(b"".join(kept) + b'{"id": "1')
    again = run(capsys, *arguments(model, exam_dir, tmp_path / "a", *drawn[:-1], "fsdp=1,data=8"))
    assert read_all(tmp_path / "a") == whole
    assert path.read_bytes().splitlines(keepends=True)[:2] == kept
    assert again == found


@pytest.mark.full
def test_hosts_share_an_exam_and_the_last_one_makes_the_report(capsys, tmp_path, model, exam_dir):
    alone = run(capsys, *arguments(model, exam_dir, tmp_path / "alone", "--slots", "8"))
    given = arguments(model, exam_dir, tmp_path / "shared", "--slots", "8")
    with cli.exit_on_error():
        main([*given, "--share", "1/2", "--json"])
    assert "--share 1/2 is answered" in capsys.readouterr().out
    assert not (tmp_path / "shared" / "report.json").exists()
    found = run(capsys, *given, "--share", "0/2")
    for one in (alone, found):
        del one["models"][0]["folder"]
    assert found == alone and alone["models"][0]["likelihood"] is None  # no letters to weigh
    names = {path.name for path in (tmp_path / "shared" / "responses").iterdir()}
    assert names == {
        f"{m}-0.{n}of2.jsonl" for m in ("answer_only", "explain_first") for n in (0, 1)
    }


@pytest.mark.full
def test_processes_take_an_exam_at_once(capsys, tmp_path, model, exam_dir):
    alone = run(capsys, *arguments(model, exam_dir, tmp_path / "alone", "--slots", "8"))
    given = arguments(model, exam_dir, tmp_path / "shared", "--slots", "8", "--json", "--share")
    command = [sys.executable, "-m", "rpo_jax.evaluate", *given]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([*command, f"{i}/2"], cwd=REPO, stdout=pipe, stderr=pipe, text=True)
        for i in range(2)
    ]
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    # Who ends last makes the report; both may, where they end together.
    reports = [json.loads(out.splitlines()[-1]) for out, _ in said if "is answered" not in out]
    del alone["models"][0]["folder"]
    for found in reports:
        del found["models"][0]["folder"]
    assert reports in ([alone], [alone, alone])
    lines = read_all(tmp_path / "shared")
    assert {name: len(own) for name, own in lines.items()} == {
        f"{m}-0.{n}of2.jsonl": 3 for m in ("answer_only", "explain_first") for n in (0, 1)
    }


@pytest.mark.full
def test_a_chat_model_is_asked_by_its_template(capsys, tmp_path, model, exam_dir):
    chatty = tmp_path / "chatty"
    shutil.copytree(model, chatty)
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (chatty / "model" / "chat_template.jinja").write_text(template)
    given = arguments(chatty, exam_dir, tmp_path / "a", "--modes", "answer_only", "--slots", "8")
    (one,) = run(capsys, *given, "--answer_tokens", "2")["models"]
    opened = open_model(chatty, MeshConfig(data=1, fsdp=8))
    style = find_prompt(find_exam("fictional"), "answer_only", 0, chat=True)
    questions = {question.id: question for question in read_questions(exam_dir, [YEAR])}
    assert one["settings"]["chat"] and one["modes"]["answer_only"]["prompt"] == style.name
    eos = opened.tokenizer.eos_id
    for answer in read_answers(tmp_path / "a", "answer_only", 0):
        turns = [m["content"] for m in style.messages(questions[answer.id])]
        ids = [id_ for text in turns for id_ in (*opened.tokenizer.encode(text), eos)]
        written = int(np.argmax(whole_logits(opened, ids)))
        first = "" if written == eos else opened.tokenizer.decode([written])
        assert answer.text.startswith(first)
    assert "no chat template" in refuse(
        capsys, *arguments(model, exam_dir, tmp_path / "b", "--chat", "yes")
    )
    plain = run(capsys, *given[:-4], "--out", str(tmp_path / "c"), "--chat", "no", "--slots", "8")
    assert plain["models"][0]["settings"]["chat"] == ""


@pytest.mark.full
def test_answers_are_those_of_the_prompts(capsys, tmp_path, model, exam_dir):
    given = arguments(model, exam_dir, tmp_path / "a", "--modes", "answer_only", "--stop")
    found = run(capsys, *given, "--answer_tokens", "1", "--no-likelihood", "--slots", "8")
    assert found["models"][0]["likelihood"] is None
    questions = {question.id: question for question in read_questions(exam_dir, [YEAR])}
    opened = open_model(model, MeshConfig(data=1, fsdp=8))
    style = find_prompt(find_exam("fictional"), "answer_only", 0)
    for answer in read_answers(tmp_path / "a", "answer_only", 0):
        ids = opened.tokenizer.encode(style.render(questions[answer.id]))
        written = int(np.argmax(whole_logits(opened, ids)))
        ended = written == opened.tokenizer.eos_id
        assert answer.text == ("" if ended else opened.tokenizer.decode([written]))
        assert answer.prediction == predict(answer.text)
        assert (answer.tokens, answer.stop_reason) == (1, "eos" if ended else "length")


def whole_logits(opened, ids: list[int]) -> np.ndarray:
    """Logits behind the last token, by one whole pass without a cache."""
    tokens = np.zeros((8, 256), np.int32)
    tokens[:, : len(ids)] = ids
    segments = (np.arange(256) < len(ids)).astype(np.int32)[None].repeat(8, 0)
    positions = np.arange(256, dtype=np.int32)[None].repeat(8, 0)
    with jax.set_mesh(opened.mesh):
        hidden = WHOLE(opened.network, opened.params, tokens, segments, 0 * tokens, positions)
        logits = np.asarray(hidden[0, len(ids) - 1] @ head_table(opened.params).T)
    return logits[: opened.tokenizer.vocab_size].astype(np.float64)


@pytest.mark.full
def test_letters_are_weighed_by_their_log_probabilities(
    capsys, tmp_path, model, exam_dir, lettered
):
    given = arguments(model, exam_dir, tmp_path / "a", "--modes", "answer_only")
    found = run(capsys, *given)["models"][0]["likelihood"]
    opened = open_model(model, MeshConfig(data=1, fsdp=8))
    style, encode = find_prompt(lettered, "answer_only", 0), opened.tokenizer.encode
    questions = {question.id: question for question in read_questions(exam_dir, [YEAR])}
    assert found["logps"] and all(has_one_letter(questions[id_]) for id_ in found["logps"])
    right = 0
    for id_, logps in found["logps"].items():
        question = questions[id_]
        first, *_ = (encode(style.target(question, (x,))) for x in question.letters)
        logits = whole_logits(opened, encode(style.render(question)) + first[:-1])
        expected = logits - np.log(np.exp(logits).sum())
        letters = [encode(style.target(question, (x,)))[-1] for x in question.letters]
        np.testing.assert_allclose(logps, expected[letters], atol=1e-4)
        right += question.letters[int(np.argmax(logps))] in question.accepted[0]
    assert found["right"] == right and found["questions"] == len(found["logps"])


def test_what_contradicts_itself_is_refused(capsys, tmp_path, model, exam_dir):
    given = arguments(model, exam_dir, tmp_path / "a")
    assert "--temperature 0 all seeds answer alike" in refuse(capsys, *given, "--seeds", "0,1")
    assert "--shots 1: no such prompt" in refuse(capsys, *given, "--shots", "1")
    assert "answer_only, explain_first" in refuse(capsys, *given, "--modes", "guess")
    assert "axes like data=2" in refuse(capsys, *given, "--mesh", "rows=2")
    assert "a count is wanted" in refuse(capsys, *given, "--limit", "-1")
    assert "wants 3 devices" in refuse(capsys, *given, "--mesh", "data=3,fsdp=1")
    nowhere = ["--checkpoint", str(tmp_path / "nowhere"), *given[2:]]
    assert "config.json is not there" in refuse(capsys, *nowhere)
    assert "config.json is not there" in refuse(capsys, *nowhere[:2], "--exam", "fictional")
    lost = [*given[:4], "--out", str(tmp_path / "a")]
    assert "where is it? give --exam_dir" in refuse(capsys, *lost)
    for one, other in (
        ("--score", "--report"),
        ("--checkpoint", "--score"),
        ("--config", "--report"),
    ):
        told = f"{one} and {other} are given; one of them alone is wanted"
        assert told in refuse(capsys, other, "x", one, "y")
    assert not (tmp_path / "a").exists()


def test_progress_without_a_terminal_is_a_line_now_and_then(caplog, exam_dir):
    questions = read_questions(exam_dir, [YEAR])[:3]
    caplog.set_level("INFO")

    def answer_all(every_seconds: float, **bar: object) -> list[str]:
        caplog.clear()
        with tqdm(total=3, **bar) as progress:
            count = RunningScore(find_exam("fictional"), progress, every_seconds)
            for question in questions:
                text = ",".join(question.accepted[0])
                count(Ask(question, "answer_only", 0, ""), Response(question.id, text))
        return caplog.messages

    points = [question.points for question in questions]
    assert answer_all(-1, disable=True) == [
        f"fictional: {n} of 3 answers; points answer_only {sum(points[:n])}/{sum(points[:n])}"
        for n in (1, 2, 3)
    ]
    assert [line[:17] for line in answer_all(60, disable=True)] == ["fictional: 3 of 3"]
    assert answer_all(-1, file=io.StringIO()) == []


def test_flags_can_come_from_a_file(capsys, tmp_path, model, exam_dir):
    flags = tmp_path / "exam.flags"
    given = arguments(model, exam_dir, tmp_path / "a", "--shots", "1")
    flags.write_text("\n".join(given) + "\n")
    assert "--shots 1: no such prompt" in refuse(capsys, f"@{flags}")


@pytest.mark.parametrize("name", ["preferred_medllm_72b", "qwen25_72b"])
def test_the_flags_of_the_released_models_ask_for_the_whole_exam(name):
    plan = parse_plan([f"@{REPO}/configs/exam_{name}.flags"])
    assert (plan.exam.name, plan.limit, plan.shots) == ("igakuqa", 0, 3)
    assert plan.modes == ("answer_only", "explain_first") and plan.drawing.temperature == 0
    assert plan.mesh.tensor == 4 and plan.dtype == "bfloat16"
