"""Sittings: each question once, whatever kills them; and nothing mixed up."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rpo_jax.errors import UserError
from rpo_jax.exams.asking import (
    ANSWER_ONLY,
    EXPLAIN_FIRST,
    MODES,
    Ask,
    Drawing,
    Share,
    ask_all,
    choose_questions,
    find_prompt,
    list_answers,
    open_sitting,
    read_answers,
    read_sitting,
)
from rpo_jax.exams.known.fictional import EXAM
from rpo_jax.exams.responses import Response
from tests.sittings import make_exam, plan_sitting


@pytest.fixture(scope="module")
def exam(tmp_path_factory) -> tuple:
    return make_exam(tmp_path_factory.mktemp("exam"))


class Model:
    """Answers in an order of its own, counts what it is asked, and can break off."""

    def __init__(self, breaks_after: int = 10**9):
        self.asked: list[tuple[str, int, str]] = []
        self.left = breaks_after

    def __call__(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Response]]:
        for ask in reversed(asks):
            if not self.left:
                raise RuntimeError("out of power")
            self.left -= 1
            self.asked.append((ask.mode, ask.seed, ask.question.id))
            yield ask, Response(ask.question.id, f"答え: {ask.seed}", "a", "eos", 3)


def make_asks(questions, seeds=(0, 1)) -> list[Ask]:
    return [
        Ask(question, mode, seed, find_prompt(EXAM, mode, 0).render(question))
        for mode in MODES
        for seed in seeds
        for question in questions
    ]


def test_every_question_is_asked_once_over_many_breaks(tmp_path, exam):
    directory, questions = exam
    open_sitting(tmp_path, plan_sitting(directory, questions))
    asks, asked = make_asks(questions[:10]), []
    for breaks_after in (0, 1, 7, 12, 10**9, 10**9):
        model, told = Model(breaks_after), []
        try:
            ask_all(tmp_path, asks, model, lambda ask, response, told=told: told.append(ask))
        except RuntimeError:
            pass
        else:
            assert sorted(map(id, told)) == sorted(map(id, asks))
        asked += model.asked
    assert len(asked) == len(set(asked)) == len(asks)
    assert list_answers(tmp_path) == [(m, s) for m in MODES for s in (0, 1)]
    answers = read_answers(tmp_path, EXPLAIN_FIRST, 1)
    assert {response.id for response in answers} == {question.id for question in questions[:10]}
    assert {response.text for response in answers} == {"答え: 1"}


def test_a_torn_last_line_is_asked_again_and_another_is_named(tmp_path, exam):
    directory, questions = exam
    open_sitting(tmp_path, plan_sitting(directory, questions))
    asks = make_asks(questions[:3], seeds=(0,))
    ask_all(tmp_path, asks, Model())
    path = tmp_path / "responses" / "answer_only-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    model = Model()
    ask_all(tmp_path, asks, model)
    assert len(model.asked) == 1
    assert path.read_bytes() == whole
    path.write_bytes(b'{"id": \n' + whole)
    with pytest.raises(UserError, match=r"answer_only-0\.jsonl:1: damaged"):
        read_answers(tmp_path, ANSWER_ONLY, 0)
    path.write_bytes(whole + whole.splitlines(keepends=True)[0])
    with pytest.raises(UserError, match=r"answer_only-0\.jsonl:4: .* answered before"):
        read_answers(tmp_path, ANSWER_ONLY, 0)


def test_a_killed_process_loses_nothing_that_it_counted(tmp_path, exam):
    directory, questions = exam
    open_sitting(tmp_path, plan_sitting(directory, questions))
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from pathlib import Path
from rpo_jax.exams.asking import Ask, ask_all
from rpo_jax.exams.igakuqa import read_questions
from rpo_jax.exams.known.fictional import EXAM
from rpo_jax.exams.responses import Response
questions = read_questions({str(directory)!r}, [3003])
asks = [Ask(q, "answer_only", 0, "") for q in questions]
def answer(asks):
    for ask in asks:
        time.sleep(0.1)  # not over before it is killed
        yield ask, Response(ask.question.id, "a")
ask_all(Path({str(tmp_path)!r}), asks, answer, lambda a, r: print(a.question.id, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    counted = [process.stdout.readline().strip() for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    counted += process.stdout.read().split()
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    stored = [response.id for response in read_answers(tmp_path, ANSWER_ONLY, 0)]
    assert len(stored) - 1 <= len(counted) <= len(stored)
    assert stored[: len(counted)] == counted


def test_two_processes_do_not_answer_the_same_questions(tmp_path, exam):
    """The second is refused, and what the first wrote is whole."""
    directory, questions = exam
    open_sitting(tmp_path, plan_sitting(directory, questions))
    asks = make_asks(questions[:5], seeds=(0,))

    def answer(asked: Sequence[Ask]) -> Iterator[tuple[Ask, Response]]:
        with pytest.raises(UserError, match="another process is writing it"):
            ask_all(tmp_path, asks, Model())
        yield from Model()(asked)

    ask_all(tmp_path, asks, answer)
    assert sum(len(read_answers(tmp_path, mode, 0)) for mode in MODES) == len(asks) == 10


def test_another_sitting_in_the_folder_is_refused(tmp_path, exam):
    directory, questions = exam
    sitting = plan_sitting(directory, questions)
    open_sitting(tmp_path, sitting)
    open_sitting(tmp_path, sitting)
    open_sitting(tmp_path, dataclasses.replace(sitting, exam_dir="/moved", model="/moved/too"))
    assert read_sitting(tmp_path) == sitting
    for modes in (MODES[1:], MODES[:1], ()):  # asked one after the other
        open_sitting(tmp_path, dataclasses.replace(sitting, modes=modes))
    assert read_sitting(tmp_path) == dataclasses.replace(sitting, modes=MODES)
    for change, told in (
        ({"weights": "0"}, "weights: '0123456789abcdef' -> '0'"),
        ({"drawing": Drawing(temperature=1.0)}, "drawing"),
        ({"questions": "x", "asked": 3}, "questions"),
        ({"shots": 3}, "shots: 0 -> 3"),
    ):
        with pytest.raises(UserError, match="another sitting") as error:
            open_sitting(tmp_path, dataclasses.replace(sitting, **change))
        assert told in str(error.value) and "--out" in str(error.value)


def test_missing_and_damaged_sittings_are_named(tmp_path, exam):
    with pytest.raises(UserError, match="holds no sitting"):
        read_sitting(tmp_path)
    (tmp_path / "sitting.json").write_text('{"exam": 1}')
    with pytest.raises(UserError, match=r"sitting\.json: damaged"):
        read_sitting(tmp_path)
    with pytest.raises(UserError, match=r"--shots 2: no such prompt.*answer_only with 3 shots"):
        find_prompt(EXAM, ANSWER_ONLY, 2)


def test_a_slice_is_spread_over_the_exam(exam):
    _, questions = exam
    assert choose_questions(questions, 0) == questions
    assert choose_questions(questions, 10**6) == questions
    few = choose_questions(questions, 12)
    assert len(few) == 12 and [q for q in questions if q in few] == few
    assert {q.section for q in few} == {q.section for q in questions}


def test_what_is_written_can_be_scored_as_a_file(tmp_path, exam):
    directory, questions = exam
    open_sitting(tmp_path, plan_sitting(directory, questions))
    ask_all(tmp_path, make_asks(questions, seeds=(0,)), Model())
    lines = (tmp_path / "responses" / "answer_only-0.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert set(record) == {"id", "text", "prediction", "stop_reason", "tokens"}
    assert os.listdir(tmp_path / "responses")


def test_shares_of_several_hosts_are_everything_once(tmp_path, exam):
    directory, questions = exam
    open_sitting(tmp_path, plan_sitting(directory, questions))
    asks, asked = make_asks(questions[:7]), []
    for breaks_after in (3, 10**9):  # each host is broken off once, and goes on
        for number in range(3):
            model, told = Model(breaks_after), []
            share = Share(number, 3)
            with contextlib.suppress(RuntimeError):
                ask_all(tmp_path, asks, model, lambda ask, _, told=told: told.append(ask), share)
            asked += model.asked
            torn = tmp_path / "responses" / "explain_first-1.1of3.jsonl"
            if number == 1 and breaks_after == 3:
                with torn.open("ab") as file:  # in the middle of a line, while others work
                    file.write(b'{"id": "1')
                left = torn.read_bytes()
            elif number != 1:
                assert not torn.exists() or breaks_after > 3 or torn.read_bytes() == left
        if breaks_after > 3:
            assert {id(ask) for ask in told} == {id(ask) for ask in asks[2::3]}
    assert len(asked) == len(set(asked)) == len(asks)
    assert list_answers(tmp_path) == [(m, s) for m in MODES for s in (0, 1)]
    for mode, seed in list_answers(tmp_path):
        answers = read_answers(tmp_path, mode, seed)
        assert {answer.id for answer in answers} == {question.id for question in questions[:7]}
    # One host alone finds nothing left to ask.
    model = Model()
    ask_all(tmp_path, asks, model)
    assert model.asked == []
