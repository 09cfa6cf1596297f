"""The study: its runs, what it makes of answers, and all of it from end to end at a tiny size."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from runpy import run_path

import numpy as np
import pytest

from rpo_jax import study
from rpo_jax.cli import load_arms, load_config
from rpo_jax.data.tokenizer import train_sentencepiece
from rpo_jax.errors import UserError
from rpo_jax.exams.arms import (
    Sat,
    compare_arms,
    contrast_arms,
    estimate,
    guess_share,
    list_marks,
)
from rpo_jax.exams.asking import ANSWER_ONLY, EXPLAIN_FIRST, MODES
from rpo_jax.exams.exam import find_exam
from rpo_jax.exams.fictional import SIZES, make_world
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.responses import Response
from rpo_jax.exams.scoring import mark_all
from rpo_jax.training.figures import draw_arms
from rpo_jax.training.run import find_commit
from tests.sittings import gold, make_exam, wrong
from tests.test_iterate import guesser
from tests.test_iterate import overrides as rounds_overrides
from tests.test_train import REPO, base_overrides

__all__ = ["guesser"]  # the fixture

STUDY = REPO / "configs/study.py"
TINY = """
from runpy import run_path

get_config = run_path({study!r})["get_config"]


def arms():
    text = {{"stage": "cpt", "data.source": "fictional", "train.steps": 3}}
    text |= {{"optim.learning_rate": 1e-4}}
    yield "copies", {{
        "stage": "cpt", "init_from": "", "model.shape": "{shape}", "data.source": "files",
        "data.train": ("{train}",), "data.heldout": ("{held}",), "data.corpus.drop_copies": False,
        "train.steps": 80, "optim.learning_rate": 1e-2,
    }}
    yield "base", {{**text, "init_from": "copies", "data.fictional.text": "general"}}
    yield "cpt", {{**text, "init_from": "base"}}
    yield "dpo", {{"train.steps": 12, "rpo.alpha": 0.0}}
    yield "rpo", {{"train.steps": 12}}
    yield "base-rpo", {{"train.steps": 12, "init_from": "base"}}
"""


def read(tmp_path, body="", *words):
    """The runs of a study whose `arms()` has this body."""
    path = tmp_path / "one.py"
    path.write_text(
        f"from runpy import run_path\nget_config = run_path({str(STUDY)!r})['get_config']\n{body}"
    )
    return study.read_study(str(path), list(words))


ARMS = """
def arms():
    yield "base", {"stage": "cpt", "init_from": "", "model.shape": "laptop-1m",
                   "data.source": "fictional"}
    yield "cpt", {"init_from": "base"}
    yield "dpo", {"rpo.alpha": 0.0}
"""


def test_every_world_has_one_base_and_every_seed_its_arms(tmp_path):
    words = ["--config.study.worlds=(3,1000)", "--config.study.seeds=(0,7)", "--config.name=s"]
    shared, runs = read(tmp_path, ARMS, *words)
    assert [run.config.name for run in runs] == [
        f"s-world{world}-{rest}"
        for world in (3, 1000)
        for rest in ("base", "cpt-seed0", "dpo-seed0", "cpt-seed7", "dpo-seed7")
    ]
    by_name = {run.config.name: run.config for run in runs}
    assert by_name["s-world3-cpt-seed7"].init_from == "s-world3-base"
    assert by_name["s-world1000-dpo-seed7"].init_from == "s-world1000-cpt-seed7"
    for name, config in by_name.items():
        assert f"world{config.data.fictional.seed}-" in name
        assert config.seed == (7 if name.endswith("seed7") else 0)
        assert config.rpo.alpha == (0.0 if "dpo" in name else 1.0)
        assert not config.exam.name
    told = study.describe(shared, runs)
    assert "test worlds, kept for what is reported: 1000" in told
    assert "dev worlds, to be tuned on: 3" in told


def test_the_committed_study_has_the_arms_of_the_paper():
    for form, seeds in (("", 1), (":standard", 1), (":reported", 3)):
        shared, runs = study.read_study(f"{STUDY}{form}", [])
        assert len(shared.study.seeds) == seeds
        assert all((world >= 1000) == (form == ":reported") for world in shared.study.worlds)
        arms = {run.arm: run.config for run in runs}
        assert list(arms) == [
            "copies",
            "comparisons",
            "choices",
            "riddles",
            "base",
            "cpt",
            "cpt-sft",
            "cpt-dpo",
            "cpt-rpo",
            "base-rpo",
        ]
        assert arms["cpt-sft"].rpo.preference == "none" and arms["cpt-sft"].rpo.alpha == 1
        assert arms["cpt-dpo"].rpo.preference == "dpo" and arms["cpt-dpo"].rpo.alpha == 0
        assert arms["cpt-rpo"].rpo.preference == "dpo" and arms["cpt-rpo"].rpo.alpha == 1
        last = [arms[name] for name in ("cpt-sft", "cpt-dpo", "cpt-rpo", "base-rpo")]
        assert len({(one.train, one.data, one.optim) for one in last}) == 1
        assert len({one.init_from for one in last[:3]}) == 1
        assert last[3].init_from == arms["base"].name


@pytest.mark.parametrize("form", ["quick", "standard"])
def test_every_name_is_one_token(form, tmp_path):
    """The vocabulary of a form, trained as its first run does, on all that its world says."""
    settings = run_path(str(STUDY))["FORMS"][form]
    world = make_world(0, SIZES[settings["size"]])
    texts = [d.text for d in (*world.general, *world.textbook)]
    texts += [d.text for game in world.games.values() for d in game[::10]]
    tokenizer = train_sentencepiece(texts, settings["vocabulary"], tmp_path)
    graphs = (world.medicine, world.animals, world.known)
    characters = {name[0] for graph in graphs for name in graph.names}
    known = {character for character in characters if len(tokenizer.encode(character)) == 1}
    assert known == characters


def test_what_the_start_comes_from_is_trained_once(tmp_path):
    body = ARMS.replace(
        '    yield "cpt"', '    yield "more", {"init_from": "base"}\n    yield "cpt"'
    )
    body = body.replace('"cpt", {"init_from": "base"}', '"cpt", {"init_from": "more"}')
    _, runs = read(tmp_path, body, "--config.study.seeds=(0,7)", "--config.name=s")
    assert [run.config.name.removeprefix("s-world0-") for run in runs] == [
        *("base", "more", "cpt-seed0", "dpo-seed0", "cpt-seed7", "dpo-seed7")
    ]
    assert runs[4].config.init_from == "s-world0-more"


def test_the_arm_compared_with_takes_the_exam(tmp_path):
    with pytest.raises(UserError, match=r"study\.unexamined: cpt is the arm compared with"):
        read(tmp_path, ARMS, "--config.study.unexamined=('cpt',)")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("", "a function arms() is wanted"),
        ("def arms():\n    yield 'a'", "must yield pairs"),
        ("def arms():\n    yield 'a', {'rpo.alhpa': 1.0}", "did you mean --config.rpo.alpha"),
        ("def arms():\n    yield 'a', {}\n    yield 'a', {}", "a name more than once"),
        ("def arms():\n    yield 'cpt', {}", "cpt starts from 'cpt', which is no arm before it"),
        ("def arms():\n    yield 'cpt', {'rpo.alpa': 1.0}", "arm cpt: --config.rpo.alpa: there is"),
        ("def arms():\n    yield 'a', {'init_from': 'b'}", "study.start='cpt' is none of a"),
        (ARMS + "    yield 'x', {'data.fictional.size': 'standard'}", "x sets data.fictional.size"),
        ("def arms():\n    1 / 0\n    yield 'a', {}", "ZeroDivisionError"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path, body, told):
    with pytest.raises(UserError, match=re.escape(told)):
        read(tmp_path, body)


def test_an_override_of_what_an_arm_sets_is_told(tmp_path, caplog):
    read(tmp_path, ARMS, "--config.rpo.alpha=0.5", "--config.rpo.beta=0.5", "--config.name=s")
    (told,) = [line for line in caplog.messages if "holds for" in line]
    assert told.startswith("warning: --config.rpo.alpha=0.5 holds for dpo too, which sets 0.0:")


def test_the_arm_that_others_are_compared_with_is_one_of_them(tmp_path):
    with pytest.raises(UserError, match=r"study\.start='rpo' is none of base, cpt, dpo"):
        read(tmp_path, ARMS, "--config.study.start=rpo")


@pytest.mark.parametrize("field", ["worlds", "seeds"])
def test_a_study_has_worlds_and_seeds(tmp_path, field):
    with pytest.raises(UserError, match=rf"study\.{field}=\(\): one at least is wanted"):
        read(tmp_path, ARMS, f"--config.study.{field}=()")


@pytest.mark.parametrize(
    ("choices", "answers", "share"), [(5, "a", 0.2), (5, "bd", 0.1), (5, "abc", 0.1), (0, "", 0.0)]
)
def test_guessing_draws_as_many_letters_as_are_wanted(choices, answers, share):
    answer = tuple(answers) or ("120",)
    question = Question("1", "?", tuple("12345"[:choices]), answer)
    assert guess_share(question) == pytest.approx(share)


@pytest.mark.parametrize("look", [load_arms, load_config])
def test_a_form_that_is_not_there_is_told_with_those_that_are(look):
    told = r"study\.py:\d+: the argument 'standrd' is none of quick, standard, reported$"
    with pytest.raises(UserError, match=told):
        look(f"{STUDY}:standrd")


def test_other_flags_are_refused():
    with pytest.raises(UserError, match="--worlds: there is no such flag"):
        study.main(["--worlds=3"])


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return make_exam(tmp_path_factory.mktemp("exam"))[1][8:28]


def sit(questions, arm, world, seed, right):
    """A run that answers rightly the first so many questions, by mode."""
    marks = {
        mode: mark_all(
            find_exam("fictional"),
            questions,
            [
                Response(q.id, f"答え: {(gold if place < right[mode] else wrong)(q)}", None, "eos")
                for place, q in enumerate(questions)
            ],
        )
        for mode in MODES
    }
    return Sat(arm, world, seed, marks)


def sits(questions):
    """Two worlds; the start has two seeds in each, base one."""
    right = {
        "base": [(4, 4)],
        "cpt": [(10, 6), (14, 6)],
        "rpo": [(10, 10), (14, 14)],
    }
    return [
        sit(questions, arm, world, seed, dict(zip(MODES, counts, strict=True)))
        for world in (0, 1)
        for arm, seeds in right.items()
        for seed, counts in enumerate(seeds)
    ]


def test_arms_are_compared_question_by_question(questions):
    found = compare_arms(sits(questions), "cpt")
    assert {arm: (one["runs"], one["questions"]) for arm, one in found.items()} == {
        "base": (2, 40),
        "cpt": (4, 40),
        "rpo": (4, 40),
    }
    cpt, rpo = found["cpt"], found["rpo"]
    assert cpt[ANSWER_ONLY]["value"] == pytest.approx(12 / 20)
    assert cpt[EXPLAIN_FIRST]["value"] == pytest.approx(6 / 20)
    assert cpt["difference"]["value"] == pytest.approx(-6 / 20)
    assert cpt["difference"]["low"] < -6 / 20 < cpt["difference"]["high"] < 0
    # No answer changed: if 8.8 % of all questions would, that is so of 40 in one case of 40.
    unseen = pytest.approx(0.0881, abs=1e-4)
    assert rpo["difference"]["value"] == 0
    assert rpo["difference"]["high"] == -rpo["difference"]["low"] == unseen
    assert rpo["difference_gain"]["value"] == pytest.approx(6 / 20)
    assert rpo["explain_first_gain"]["value"] == pytest.approx(6 / 20)
    assert "explain_first_gain" not in cpt and "difference_gain" in found["base"]
    assert [test["lost"] for test in cpt["mcnemar"]] == [4, 8, 4, 8]
    seen = [question.section in "ABC" for question in questions] * 2
    assert set(cpt["sections"]) == {"ABC", "DEF"}
    shares = [cpt["sections"][part][EXPLAIN_FIRST]["value"] for part in ("ABC", "DEF")]
    weights = [seen.count(True) / 40, seen.count(False) / 40]
    assert np.dot(shares, weights) == pytest.approx(6 / 20)
    kinds = [question.category for question in questions]
    assert set(cpt["kinds"]) == set(kinds)
    changes = [cpt["kinds"][kind]["difference"]["value"] for kind in set(kinds)]
    counts = [kinds.count(kind) / 20 for kind in set(kinds)]
    assert np.dot(changes, counts) == pytest.approx(-6 / 20)


def test_arms_are_held_against_each_other(questions):
    done = sits(questions)
    found = contrast_arms(done, ["base", "cpt", "rpo"])
    assert [(pair["less"], pair["arm"]) for pair in found] == [
        ("base", "cpt"),
        ("base", "rpo"),
        ("cpt", "rpo"),
    ]
    gained = compare_arms(done, "cpt")["rpo"]
    last = found[-1]
    assert last["explain_first"] == gained["explain_first_gain"]
    assert last["difference"] == gained["difference_gain"]
    assert last["runs"]["difference"] == pytest.approx([0.2, 0.4, 0.2, 0.4])
    (line,) = [
        x for x in study.format_contrasts(found).splitlines() if x.startswith("rpo less cpt")
    ]
    assert "+30.0 (" in line and "+30.0 ± 18.4" in line  # Student's t, 3 degrees of freedom


def test_marks_are_all_that_an_accuracy_comes_from(questions):
    done = sits(questions)
    rows = list_marks(done)
    assert len({(row["world"], row["question"]) for row in rows}) == len(rows) == 2 * 20
    for one in done:
        own = [row for row in rows if row["world"] == one.world]
        for mode in (ANSWER_ONLY, EXPLAIN_FIRST):
            right = [row[f"{one.arm} seed {one.seed} {mode}"] for row in own]
            assert right == [int(mark.extracted) for mark in one.marks[mode]]


def test_runs_that_answered_other_questions_are_not_compared(questions):
    done = sits(questions)
    moved = {mode: marks[::-1] for mode, marks in done[-1].marks.items()}
    with pytest.raises(AssertionError, match="answered different questions"):
        compare_arms([*done[:-1], replace(done[-1], marks=moved)], "cpt")


def test_an_interval_is_that_of_a_mean_over_questions():
    values = np.repeat([0.0, 1.0], 200)
    found = estimate(values)
    spread = 1.96 * np.sqrt(0.25 / 400)
    assert found["value"] == 0.5
    assert found["low"] == pytest.approx(0.5 - spread, abs=0.006)
    assert found["high"] == pytest.approx(0.5 + spread, abs=0.006)


def test_no_accuracy_is_below_nothing():
    """The exact bounds of 0 and of 64 in 64."""
    bound = pytest.approx(0.056009, abs=1e-6)
    none, all_ = estimate(np.zeros(64), least=0.0), estimate(np.ones(64), least=0.0)
    assert (none["low"], none["high"]) == (0, bound)
    assert (1 - all_["low"], all_["high"]) == (bound, 1)


def test_tables_and_figure_tell_of_all_arms(questions, tmp_path):
    done = sits(questions)
    measures = {"nll": 2.0, "nll_before": 3.0, "tokens": 1234}
    rows = [
        {"name": "x", "arm": one.arm, "world": one.world, "seed": one.seed, **measures}
        | one.scores()
        | one.gains(done, "cpt")
        for one in done
    ]
    compared = compare_arms(done, "cpt")
    told = study.format_arms(compared, rows)
    assert "40 test questions" in told
    (line,) = [line for line in told.splitlines() if line.startswith("cpt")]
    assert "60.0%" in line and "30.0%" in line and "-30.0 (" in line and "100% / 100%" in line
    assert "no arm is above guessing" not in told
    for found in compared.values():
        found["guessing"] = 1.0
    assert "no arm is above guessing in either way" in study.format_arms(compared, rows)
    assert "ABC" in study.format_sections(compared)
    (line,) = [x for x in study.format_kinds(compared).splitlines() if x.startswith("rpo")]
    assert line.count(" / ") == len(compared["cpt"]["kinds"])
    held = study.format_heldout(rows)
    assert "nats/token" in held and "1,234" in held
    assert draw_arms(tmp_path / "arms.png", compared, rows).stat().st_size > 10_000
    over_runs = study.average_runs(rows)
    # Differences of `rpo` by run are 0; those of `cpt` with the same seeds -0.2 and -0.4, twice.
    assert over_runs["rpo"]["difference_gain"].count == 4
    assert over_runs["rpo"]["difference_gain"].value == pytest.approx(0.3)
    half = 3.182446 * np.std([0.2, 0.4, 0.2, 0.4], ddof=1) / 2  # Student's t, 3 degrees of freedom
    assert over_runs["rpo"]["difference_gain"].half == pytest.approx(half)
    assert over_runs["base"]["explain_first_gain"].value == pytest.approx(-0.1)  # seed 0 alone
    assert "difference_gain" not in over_runs["cpt"]
    (line,) = [x for x in study.format_runs(over_runs).splitlines() if x.startswith("cpt")]
    assert line.split()[-2:] == ["-", "-"]


def test_pairs_have_nats_of_chosen_answers():
    """Those of SFT too, which has no margin."""
    row = {"arm": "sft", "tokens": 5, "nll": 1.0, "nll_before": 2.0}
    assert "chosen nats/token" not in study.format_heldout([row])
    row |= {"preference_accuracy": 0.5, "preference_accuracy_before": 0.5}
    assert "chosen nats/token" in study.format_heldout([row])


def run_study(words):
    """What the command prints, on one device, whose compiled programs its runs share."""
    command = [sys.executable, "-m", "rpo_jax.study", *words]
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.full
def test_a_study_goes_on_where_it_was_stopped(guesser, tmp_path):
    path, workdir = tmp_path / "tiny.py", tmp_path / "runs"
    base_overrides(tmp_path)  # writes the shape
    path.write_text(
        TINY.format(
            study=str(STUDY),
            shape=tmp_path / "shape.json",
            train=guesser / "train.jsonl",
            held=guesser / "held.jsonl",
        )
    )
    free = ("train.steps", "init_from", "name", "rounds", "optim.learning_rate")
    small = [
        word
        for word in rounds_overrides(workdir, checkpoint__save_every_steps=100)
        if not word.removeprefix("--config.").startswith(free)
    ]
    words = [
        f"--config={path}",
        *small,
        "--config.name=tiny",
        "--config.exam.questions=12",
        "--config.exam.explain_tokens=8",
        "--config.optim.warmup_steps=1",
        "--config.train.micro_batches=1",
    ]
    printed = run_study(words)
    folder = workdir / "tiny"
    results = json.loads((folder / "results.json").read_text())
    stored = json.loads((folder / "study.json").read_text())
    compared = stored["arms"]
    assert stored["commit"] == find_commit()
    assert [row["arm"] for row in results] == list(compared) == list(stored["over_runs"])
    assert list(compared) == ["base", "cpt", "dpo", "rpo", "base-rpo"]
    table = csv.DictReader((folder / "results.csv").read_text().splitlines())
    assert [row["arm"] for row in table] == list(compared)
    marks = list(csv.DictReader((folder / "marks.csv").read_text().splitlines()))
    right = [int(row["rpo seed 0 explain_first"]) for row in marks]
    assert np.mean(right) == compared["rpo"]["explain_first"]["value"]
    assert [(pair["arm"], pair["less"]) for pair in stored["contrasts"]] == [("rpo", "dpo")]
    assert all(one["questions"] == 12 for one in compared.values())
    for word in ("12 test questions", "nats/token", "preference accuracy", "arms.png"):
        assert word in printed
    for figure in ("arms.png", "log_ratios.png"):
        assert (folder / figure).stat().st_size > 10_000
    by_arm = {row["arm"]: row for row in results}
    assert by_arm["base"]["nll"] < by_arm["base"]["nll_before"]
    # Each start answered once, and arms with one start train on the same pairs.
    asked = [samples.parent.name for samples in workdir.glob("*/samples")]
    assert sorted(asked) == ["tiny-world0-base", "tiny-world0-cpt-seed0"]
    records = {
        json.loads((workdir / f"tiny-world0-{arm}-seed0/summary.json").read_text())["paths"][
            "records"
        ]
        for arm in ("dpo", "rpo")
    }
    assert len(records) == 1

    shutil.rmtree(workdir / "tiny-world0-rpo-seed0")
    shutil.rmtree(folder)
    (sitting,) = (workdir / "tiny-world0-dpo-seed0" / "exams").iterdir()
    answers = sitting / "responses" / f"{EXPLAIN_FIRST}-0.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:5]) + lines[5][:9])
    base = (workdir / "tiny-world0-base" / "metrics.jsonl").read_bytes()
    run_study(words)
    assert json.loads((folder / "results.json").read_text()) == results
    assert json.loads((folder / "study.json").read_text())["arms"] == compared
    assert (workdir / "tiny-world0-base" / "metrics.jsonl").read_bytes() == base
