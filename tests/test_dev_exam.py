"""A dev exam while a model trains: curves, the best checkpoint, and what may not be asked."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rpo_jax.config import Igakuqa
from rpo_jax.errors import UserError
from rpo_jax.examine import make_dev_looks
from rpo_jax.exams.exam import find_exam
from rpo_jax.exams.report import build_report
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.train import format_summary
from rpo_jax.training.run import read_metrics
from tests.test_generation import TOKENIZER
from tests.test_train import BASE, base_overrides, refuse, run, workdir
from tests.tiny import NETWORK, make_config

__all__ = ["workdir"]  # the fixture

STEPS = 8


def dev_overrides(workdir: Path, **fields) -> list[str]:
    return base_overrides(
        workdir,
        **{
            "train__steps": STEPS,
            "checkpoint__save_every_steps": 4,
            "checkpoint__keep": 1,
            "checkpoint__best": "explain_first",
            "exam__name": "fictional",
            "exam__questions": 4,
            "exam__every_steps": 3,
            "exam__answer_tokens": 3,
            "exam__explain_tokens": 5,
            **fields,
        },
    )


def read_curves(folder: Path) -> dict[int, dict[str, float]]:
    lines = [line for line in read_metrics(folder) if "exam/explain_first/share" in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line for line in lines}


@pytest.mark.full
def test_curves_are_those_of_the_answers_and_a_resumed_run_asks_nothing_twice(tmp_path):
    summary = run(BASE, dev_overrides(tmp_path))
    folder = tmp_path / "fictional-base"
    curves = read_curves(folder)
    assert list(curves) == [0, 3, 6, 8]
    exam = find_exam("fictional")
    for step, curve in curves.items():
        report = build_report(exam, [folder / "exams" / f"dev-{step}"])
        assert report["years"] == list(exam.dev_years) and report["questions"]["asked"] == 4
        for mode, found in report["models"][0]["modes"].items():
            one = found["seeds"]["0"]
            assert curve[f"exam/{mode}/share"] == one["extracted"]["share"]
            assert curve[f"exam/{mode}/official_share"] == one["official"]["share"]
            assert curve[f"exam/{mode}/truncation"] == one["rates"]["truncation"]
    assert summary["exam"]["after"]["answer_only/parse"] == curves[8]["exam/answer_only/parse"]
    best = max(list(curves)[1:], key=lambda s: (curves[s]["exam/explain_first/share"], s))
    assert summary["best"]["step"] == best
    assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == {best, 8}
    assert "dev exam" in format_summary(summary) and f"step {best}" in format_summary(summary)
    assert any((folder / "tensorboard").iterdir())

    # Killed after step 8 was looked at and before it was saved.
    answers = {path: path.read_bytes() for path in folder.glob("exams/dev-*/responses/*")}
    stamps = {path: path.stat().st_mtime_ns for path in answers}
    shutil.rmtree(folder / "checkpoints" / "8")
    assert run(BASE, dev_overrides(tmp_path)) == summary
    assert read_curves(folder) == curves
    assert {path: path.read_bytes() for path in answers} == answers
    assert {path: path.stat().st_mtime_ns for path in answers} == stamps


def test_only_dev_questions_are_asked(tmp_path, capsys):
    told = refuse(capsys, BASE, dev_overrides(tmp_path, exam__years="(3003,)"))
    assert "exam.years=(3003,)" in told and "of fictional these years are left: 3002" in told
    assert not (tmp_path / "fictional-base").exists()


@pytest.mark.parametrize(
    ("trained", "asked", "left"),
    [
        ((2018, 2019), (2019, 2020), "2020, 2021"),  # one of them is trained on
        ((2018,), (2021, 2022), "2019, 2020, 2021"),  # one of them tests
        ((2018, 2019, 2020, 2021), (), "none"),
    ],
)
def test_years_of_the_real_exam_that_are_trained_on_or_test_are_refused(trained, asked, left):
    config = make_config("cpt", exam={"name": "igakuqa", "years": asked})
    igakuqa = Igakuqa(train_years=trained)
    config = replace(config, data=replace(config.data, source="igakuqa", igakuqa=igakuqa))
    with pytest.raises(UserError, match=re.escape(f"of igakuqa these years are left: {left}")):
        make_dev_looks(config, NETWORK, make_mesh(config.mesh), TOKENIZER)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exam__name": ""}, "checkpoint.best='explain_first': exam.name=''"),
        ({"exam__modes": "('guess',)"}, "exam.modes: 'guess' is none of answer_only, explain_fi"),
        ({"exam__name": "none"}, "--exam none: no such exam; known: fictional, igakuqa"),
    ],
    ids=str,
)
def test_contradictions_are_refused(tmp_path, capsys, fields, message):
    assert message in refuse(capsys, BASE, dev_overrides(tmp_path, **fields))


def test_a_summary_of_a_run_without_an_exam_has_none(workdir):
    summary = json.loads((workdir / "fictional-base" / "summary.json").read_text())
    assert summary["exam"] == {} and summary["best"] is None
    assert "dev exam" not in format_summary(summary)
