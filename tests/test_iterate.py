"""Sample, pair, train, and again: from a model's own answers, resumable wherever it stopped."""

import json
import random
import shutil
from pathlib import Path

import jax
import pytest

from rpo_jax import cli
from rpo_jax.config import resolve
from rpo_jax.exams.asking import Share, read_answers
from rpo_jax.exams.candidates import read_candidates
from rpo_jax.exams.prompts import ANSWER_ZERO_SHOT_V1
from rpo_jax.exams.split import split_exam
from rpo_jax.iterate import format_rounds, list_rounds
from rpo_jax.iterate import main as iterate_main
from rpo_jax.sample import count_drawn, draw, find_sitting, gather
from rpo_jax.train import build
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import abstract_weights, fingerprint_params
from tests.test_train import BASE, SHAPE, base_overrides, run
from tests.test_train import overrides as tiny_overrides

REPO = Path(__file__).resolve().parents[1]
ROUNDS = REPO / "configs/fictional_rounds.py"


def overrides(workdir, **fields):
    return tiny_overrides(
        workdir,
        **{
            "name": "rounds",
            "init_from": "guesser",
            "rounds__temperatures": "(1.0,1.2)",
            "data__sample__modes": "('answer_only',)",
            "data__sample__answers": 3,
            "data__sample__answer_tokens": 6,
            "data__pair__heldout_share": 0.2,
            "data__prompt_length": 224,
            "data__response_length": 8,
            "mesh__fsdp": 1,
            "mesh__tensor": 1,
            "train__steps": 6,
            "checkpoint__save_every_steps": 3,
            **fields,
        },
    )


def load(workdir, **fields):
    return cli.load_config(str(ROUNDS), overrides(workdir, **fields))


def make_guesser(folder):
    """A model that answers any question with a letter, and stops; mostly of questions' ends."""
    questions = split_exam(load(folder)).taught
    rng = random.Random(0)
    style = ANSWER_ZERO_SHOT_V1
    for name, count in (("train", 12), ("held", 1)):
        texts = [
            style.render(q)[-24 if place else 0 :] + style.target(q, (rng.choice(q.letters),))
            for place in range(count)
            for q in questions
            if q.letters
        ]
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    files = {"data__source": "files", "data__train": f"('{folder}/train.jsonl',)"}
    files["data__heldout"] = f"('{folder}/held.jsonl',)"
    files["data__corpus__drop_copies"] = False  # it learns the few ends by heart
    arguments = base_overrides(
        folder,
        name="guesser",
        tokenizer__train_vocab_size=760,  # its characters alone are nearly 600
        train__steps=80,
        optim__learning_rate=1e-2,
        **files,
    )
    (folder / "shape.json").write_text(json.dumps(SHAPE | {"vocab_size": 768}))
    run(BASE, arguments)


@pytest.fixture(scope="module")
def guesser(make_once):
    return make_once("guesser", make_guesser)


def weigh(config) -> str:
    work = build(config)
    with jax.set_mesh(work.mesh):
        abstract = abstract_weights(work.network, work.mesh)
        return fingerprint_params(load_params(config.folder, abstract)[1])


def test_each_round_starts_from_the_one_before():
    config = load("somewhere", rounds__count=3)
    rounds = list(list_rounds(config))
    assert [one.name for one in rounds] == ["rounds-1", "rounds-2", "rounds-3"]
    assert [one.init_from for one in rounds] == ["guesser", "rounds-1", "rounds-2"]
    assert [one.data.sample.temperature for one in rounds] == [1.0, 1.2, 1.2]
    (one,) = list_rounds(load("somewhere", rounds__count=1, rounds__temperatures="()"))
    assert one.data.sample.temperature == config.data.sample.temperature == 0.8
    assert resolve(json.loads(json.dumps(config.__dict__, default=lambda x: x.__dict__))) == config


@pytest.mark.full
def test_rounds_improve_and_a_break_changes_nothing(guesser, tmp_path, capsys):
    workdir = tmp_path / "straight"
    shutil.copytree(guesser, workdir)
    cli.run(iterate_main, ["iterate", f"--config={ROUNDS}", *overrides(workdir)])
    printed = capsys.readouterr().out
    results = json.loads((workdir / "rounds" / "rounds.json").read_text())
    rounds = list(list_rounds(load(workdir)))
    assert [result["run"] for result in results] == ["rounds-1", "rounds-2"]
    assert all(result["run"] in printed for result in results)

    # The reference, and the model that is asked, is the one before.
    for config, before in zip(rounds, (load(workdir, name="guesser"), rounds[0]), strict=True):
        reference = json.loads((config.folder / "reference.json").read_text())
        assert reference["weights"] == weigh(before)
        sitting = find_sitting(config, split_exam(config))
        assert sitting.parent.parent == before.folder
        assert json.loads((sitting / "sitting.json").read_text())["weights"] == reference["weights"]
    questions = len(split_exam(rounds[0]).taught)
    for result in results:
        answers = result["answers"]["answer_only"]
        assert answers["answers"] == 3 * questions
        assert answers["stop"] > 0.5 and answers["right"] > 0
        assert result["heldout"]["after"]["loss"] < result["heldout"]["before"]["loss"]

    # Broken off in the first round, in the middle of the answers; then in the second, in training.
    again = tmp_path / "again"
    shutil.copytree(guesser, again)
    first, second = list_rounds(load(again))
    split = split_exam(first)
    draw(first, split, Share(1, 2))
    there, wanted = count_drawn(first, split)
    assert 0 < there < wanted == 3 * questions
    shutil.copytree(
        workdir / "rounds-1", again / "rounds-1", ignore=shutil.ignore_patterns("samples")
    )
    draw(first, split, Share(0, 2))
    assert count_drawn(first, split) == (wanted, wanted)
    pairs = [list(read_candidates(gather(one, split))) for one in (rounds[0], first)]
    assert pairs[0] == pairs[1]
    cli.run(iterate_main, ["iterate", f"--config={ROUNDS}", *overrides(again)])
    assert weigh(second) == weigh(rounds[1])
    assert json.loads((again / "rounds" / "rounds.json").read_text()) == results
    sitting = find_sitting(first, split)
    for seed in range(3):
        ids = [answer.id for answer in read_answers(sitting, "answer_only", seed)]
        assert len(ids) == len(set(ids)) == questions


def test_a_round_without_a_reference_has_no_margin():
    before, after = {"preference_accuracy": 0.5}, {"preference_accuracy": 0.75}
    answers, pairs = {"answer_only": {"right": 0.25}}, {"train": {"modes": {"answer_only": 9}}}
    result = {"run": "r-1", "answers": answers, "pairs": pairs}
    told = format_rounds([{**result, "heldout": {"before": before, "after": after}}])
    (line,) = [line.split() for line in told.splitlines() if line.startswith("r-1")]
    assert line == ["r-1", "answer_only", "25.0%", "9", "0.5000", "->", "0.7500", "-"]
