"""The model card of an export: whose the base is, how it was trained, what not to do with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from converting import import_, run
from hub import TIED, write_checkpoint
from tiny import make_config

from rpo_jax.config import Config, Fictional, Lora, Pair, Sample, to_dict
from rpo_jax.weights.card import make_card, make_notice
from rpo_jax.weights.history import History, tell_history

QWEN = "Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud."


def test_the_card_says_whose_it_is_and_what_not_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_(write_checkpoint(tmp_path / "in", TIED), tmp_path / "model")
    (tmp_path / "results.md").write_text("IgakuQA 2022: 0.5")
    words = ("--source", tmp_path / "model", "--results", tmp_path / "results.md")
    said, bases = {}, {"a": "Qwen/Qwen2.5-72B", "b": "Qwen/Qwen2.5-7B", "c": "none"}
    for name, base in bases.items():
        run("export", *words, "--target", tmp_path / name, "--base", base)
        said[name] = capsys.readouterr().out
    big, small, none = ((tmp_path / x / "README.md").read_text() for x in "abc")
    assert "license_name: qwen\n" in big and "Built with Qwen" in big and QWEN in big
    assert (tmp_path / "a" / "NOTICE").read_text().startswith(QWEN)
    assert "wants a copy of itself" in said["a"]
    assert "license: apache-2.0\n" in small and "base_model: Qwen/Qwen2.5-7B\n" in small
    assert not (tmp_path / "b" / "NOTICE").exists() and "LICENSE" not in said["b"]
    assert "base_model" not in none and "random weights" not in none
    assert "imported from files; their base model was not named" in none
    for card in (big, small, none):
        assert "Do not use it to diagnose" in card and "IgakuQA 2022: 0.5" in card
        assert "changed by further training" not in card


def test_a_card_without_a_base_tells_where_it_began() -> None:
    random = make_card("none", "Step 1.", True, History()).decode()
    assert "Trained from random weights; no published model is its base." in random
    further = make_card("none", "Step 1.", True, History(), imported=True).decode()
    assert "imported from files" in further and "changed by further training" in further


@pytest.mark.parametrize(
    ("base", "front"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", "license: other\nlicense_name: qwen-research\n"),
        ("Qwen/Qwen2.5-14B-Instruct", "license: apache-2.0\nlicense_link"),
        ("pfnet/Preferred-MedLLM-Qwen-72B", "license: other\nlicense_link"),
        ("somebody/Qwen2.5-72B", "license: other\nlicense_link"),
    ],
)
def test_no_licence_is_claimed_that_is_not_known(base: str, front: str) -> None:
    card = make_card(base, "Step 1.", True, History()).decode()
    assert front in card
    assert ("Apache" in card) == ("14B" in base)
    assert ("Built with Qwen" in card) == bool(make_notice(base)) == ("Qwen2.5-3B" in base)
    assert "changed by further training" in card


def write_run(root: Path, config: Config) -> Path:
    config = replace(config, workdir=str(root))
    folder = root / config.name
    folder.mkdir()
    marks = {"the training data": "0123456789abcdef0123"}
    (folder / "run.json").write_text(json.dumps({"config": to_dict(config), "data": marks}))
    return folder


def test_runs_tell_how_a_model_came_about(tmp_path: Path) -> None:
    files = {"source": "files", "train": ("/a/text.jsonl",), "heldout": ("/a/held.jsonl",)}
    first = make_config("cpt", data=files)
    write_run(tmp_path, replace(first, name="first", init_from="./models/qwen"))
    second = make_config("rpo", rpo={"alpha": 0.25}, data={"source": "igakuqa"})
    second = replace(second, lora=Lora(rank=4, quantize="nf4"))
    folder = write_run(tmp_path, replace(second, name="second", init_from="first"))
    measures = {"before": {"nll": 2.0}, "after": {"nll": 1.25}}
    (folder / "summary.json").write_text(json.dumps({"steps": 10, "heldout": measures}))
    points = {mark: {"mean": mean} for mark, mean in (("official", 3.0), ("extracted", 41.5))}
    model = {"settings": {"step": 10}, "modes": {"answer_only": {"points": points}}}
    report = {"title": "An exam", "questions": {"points": 50}, "models": [model]}
    (folder / "exams" / "one").mkdir(parents=True)
    (folder / "exams" / "one" / "report.json").write_text(json.dumps(report))
    told = tell_history(folder, 10)
    cpt, rpo = told.method.splitlines()[:2]
    assert "CPT" in cpt and "next-token loss" in cpt and "all weights" in cpt
    assert "RPO" in rpo and "plus 0.25 x NLL" in rpo and "LoRA of rank 4, alpha 16 over nf4" in rpo
    assert "text.jsonl; fingerprint 0123456789abcdef." in told.data and "2018" in told.data
    assert "/a/" not in told.data  # a release does not tell where its files lay
    assert "| nll | 2.0000 | 1.2500 |" in told.results
    assert "| An exam: answer_only | 3 | 41.5 | 50 |" in told.results
    # Of another step nothing was measured.
    early = tell_history(folder, 5)
    assert "of step 5 of 10" in early.method and early.results == ""
    assert tell_history(tmp_path / "first", 10).results == ""
    assert tell_history(tmp_path / "nothing", 0) == History()


def test_pairs_tell_whose_answers_they_are_of(tmp_path: Path) -> None:
    data = {
        "source": "candidates",
        "sample": Sample(answers=0, files=("/secret/ans.jsonl",)),
        "pair": Pair(strategy="right_over_wrong"),
        "fictional": Fictional(size="tiny"),
    }
    folder = write_run(tmp_path, make_config("rpo", data=data))
    records = tmp_path / "data" / "pairs-0123456789abcdef"
    records.mkdir(parents=True)
    (records / "dataset.json").write_text('{"records": 8}')
    told = tell_history(folder, 10).data
    assert "pairs by right_over_wrong of answers to the fictional world 0 (tiny)" in told
    assert "(those in ans.jsonl), pairs trained on: 8; fingerprint 0123456789abcdef." in told
    assert "textbook" not in told and "/secret" not in told and "drawn" not in told


def test_a_run_of_another_version_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path, make_config("cpt"))
    (folder / "run.json").write_text('{"config": {"stage": "cpt", "colour": 1}}')
    assert tell_history(folder, 10) == History()
    assert "not told in the card" in caplog.text and "colour" in caplog.text
