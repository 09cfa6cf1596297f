"""Train and evaluate from end to end at the smallest scale, and what they refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rpo_jax import cli
from rpo_jax.config import Checkpoint
from rpo_jax.data.records import open_records
from rpo_jax.errors import DivergedError, Stopped
from rpo_jax.evaluate import format_result, measure_run
from rpo_jax.train import build, train
from rpo_jax.train import main as train_main
from rpo_jax.training import loop
from rpo_jax.training.checkpoint import open_checkpoints, save_state
from rpo_jax.training.origin import load_params
from rpo_jax.training.run import find_commit, read_metrics
from rpo_jax.training.state import abstract_weights, fingerprint_params

REPO = Path(__file__).resolve().parents[1]
BASE, CPT, RPO = (REPO / f"configs/fictional_{stage}.py" for stage in ("base", "cpt", "rpo"))
SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 608,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def overrides(workdir, **fields):
    """Command-line overrides that make a run tiny; `train__steps=3` is --config.train.steps=3."""
    tiny = {
        "workdir": workdir,
        "data__fictional__size": "tiny",
        "tokenizer__train_vocab_size": 600,
        "train__steps": 40,
        "train__batch_rows": 8,
        "train__log_every_steps": 2,
        "optim__warmup_steps": 1,
        "checkpoint__save_every_steps": 10,
        "data__row_length": 64,
        "mesh__fsdp": 2,
        "mesh__tensor": 2,
    } | fields
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in tiny.items()]


def base_overrides(workdir, **fields):
    shape = Path(workdir) / "shape.json"
    shape.parent.mkdir(parents=True, exist_ok=True)
    shape.write_text(json.dumps(SHAPE))
    general = Path(workdir) / "general.txt"
    general.write_text("昨日は雨が降ったので、駅まで傘をさして歩いた。" * 8)
    return overrides(workdir, model__shape=shape, data__general=f"('{general}',)", **fields)


def rpo_overrides(workdir, **fields):
    lengths = {"data__prompt_length": 224, "data__response_length": 224}
    return overrides(workdir, **{**lengths, "init_from": "fictional-base", **fields})


def run(config, arguments):
    """A run as the command makes it; returns its summary."""
    return train(build(cli.load_config(str(config), arguments)))


def refuse(capsys, config, arguments, main=train_main):
    """The message a command ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main, ["train", f"--config={config}", *arguments])
    assert stop.value.code == 2
    message = capsys.readouterr().err.split("error: ", 1)[1]
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="session")
def workdir(make_once):
    """A folder with a finished base run, only to be read (runs beside it are fine)."""
    return make_once("workdir", lambda folder: run(BASE, base_overrides(folder)))


def test_a_stage_after_a_stage_improves_its_held_out_measures(workdir, tmp_path, capsys):
    arguments = rpo_overrides(workdir, name=f"rpo-{tmp_path.name}", train__steps=12)
    cli.run(train_main, ["train", f"--config={RPO}", *arguments])
    printed = capsys.readouterr().out
    folder = workdir / f"rpo-{tmp_path.name}"
    assert "share of pairs: the chosen response is the likelier one" in printed
    assert re.search(r"rpo, 12 steps, 96 pairs \(\d\.\d\d passes\), about [\d,]+ tokens", printed)
    assert re.search(r"this command took \d+ s", printed)
    assert str(folder / "checkpoints/12") in printed
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    assert before["margin"] == 0.0
    np.testing.assert_allclose(before["dpo"], np.log(2), atol=1e-6)
    assert after["loss"] < before["loss"]
    assert after["nll"] < before["nll"]
    for path in summary["paths"].values():
        assert Path(path).exists(), path
    for file in (workdir / "fictional-base/model").iterdir():
        assert (folder / "model" / file.name).read_bytes() == file.read_bytes()
    stored = json.loads((folder / "run.json").read_text())
    assert stored["config"]["train"]["steps"] == 12
    assert stored["versions"]["jax"] == jax.__version__
    assert list((folder / "tensorboard").iterdir())
    first = read_metrics(folder)[1]
    assert {
        "loss",
        "dpo",
        "nll",
        "chosen_log_ratio",
        "rejected_log_ratio",
        "margin",
    } <= first.keys()
    np.testing.assert_allclose(first["dpo"], np.log(2), atol=1e-6)
    assert first["margin"] == 0.0
    with_rates = read_metrics(folder)[2]
    assert {"tokens_per_s", "tflops", "reward_accuracy", "preference_accuracy"} <= with_rates.keys()

    # evaluate finds the same numbers in the checkpoint
    evaluated = ["evaluate", f"--config={RPO}", *arguments, "--json"]
    cli.run(measure_run, evaluated, json="")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == 12
    shown = f"{after['nll']:.4f}  nats/token (of pairs: of the tokens that rpo.nll_tokens names)"
    assert shown in format_result(result)
    for name, value in after.items():
        np.testing.assert_allclose(result["heldout"][name], value, rtol=1e-6, atol=1e-6)


def test_a_run_tells_what_it_forgets_and_what_it_was_made_of(workdir):
    folder = workdir / "fictional-base"
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    records = open_records(Path(summary["paths"]["records"]))
    seen = sum(int((record["segment_ids"] > 0).sum()) for record in records)
    assert summary["trained_on"]["read"] == 40 * 8
    assert summary["trained_on"]["tokens"] == round(320 / len(records) * seen)
    assert before["general_nll"] == pytest.approx(np.log(600), abs=0.5)
    assert len({after["nll"], after["general_nll"], before["general_nll"]}) == 3
    assert after["nll"] < before["nll"] - 0.5
    assert read_metrics(folder)[0]["heldout/general_nll"] == before["general_nll"]
    records = {open_records(path).fingerprint for path in (workdir / "data").glob("rows-*")}
    assert set(summary["data"].values()) > records and len(records) == 3
    assert json.loads((folder / "run.json").read_text())["data"] == summary["data"]
    with open_checkpoints(folder, Checkpoint()) as checkpoints:
        kept = checkpoints.checkpointables_metadata(checkpoints.latest.step).custom_metadata
    assert kept == {"fingerprints": summary["data"]}


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def count_losses(folder):
    """Steps of a run that goes on: the last line may be half written."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return sum('"loss"' in line for line in lines)


def weights(workdir, name, arguments, config=BASE):
    work = build(cli.load_config(str(config), arguments))
    with jax.set_mesh(work.mesh):
        return fingerprint_params(
            load_params(workdir / name, abstract_weights(work.network, work.mesh))[1]
        )


@pytest.mark.parametrize(
    "sign",
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.full)],
    ids=lambda s: s.name,
)
def test_a_run_that_is_stopped_goes_on_bitwise(workdir, tmp_path, sign):
    folder = tmp_path / "stopped"
    stopped = base_overrides(tmp_path, name="stopped")
    command = [sys.executable, "-m", "rpo_jax.train", f"--config={BASE}", *stopped]
    command.append("--config.train.eval_every_steps=1")  # slower: not over before the signal
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 900
    while count_losses(folder) < 12:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=900)
    if sign == signal.SIGTERM:
        assert process.returncode == 143, errors
        named = int(re.search(r"stopped at step (\d+), saved", errors)[1])
        assert (folder / "checkpoints" / str(named)).is_dir()
        assert "SIGTERM: stopped at step" in errors
    assert "Traceback" not in errors
    assert "Involuntary full rematerialization" not in errors
    cut = len(losses(folder))
    assert 12 <= cut < 40
    # what a kill in mid-write leaves: half a line
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "lo')
    run(BASE, stopped)
    assert losses(folder) == losses(workdir / "fictional-base")
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == list(range(1, 41))
    straight = base_overrides(workdir)
    assert weights(tmp_path, "stopped", stopped) == weights(workdir, "fictional-base", straight)


def test_a_signal_is_not_lost_where_a_run_diverges():
    """A sweep would leave the run behind, and begin the next one."""
    with pytest.raises(Stopped, match="SIGTERM: step 3"), loop.catch_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise DivergedError("step 3: loss nan")
    with pytest.raises(DivergedError), loop.catch_signals():
        raise DivergedError("step 3: loss nan")


def test_results_name_the_commit_they_were_made_at(tmp_path, monkeypatch):
    """Of the clone that the code lies in; what an installed package lies in is another one."""
    package = tmp_path / "clone/rpo_jax/__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("first = 1\n")
    monkeypatch.setattr("rpo_jax.__file__", str(package))
    assert find_commit() == "absent"
    git = ["git", "-C", package.parent, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q", ".."], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    named = ["git", "-C", package.parent, "rev-parse", "HEAD"]
    commit = subprocess.run(named, check=True, capture_output=True, text=True).stdout.strip()
    assert find_commit() == commit
    package.write_text("first = 2\n")
    assert find_commit() == f"{commit}-dirty"
    installed = package.parent / "lib/rpo_jax/__init__.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr("rpo_jax.__file__", str(installed))
    assert find_commit() == "absent"
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setattr("rpo_jax.__file__", str(package))
    assert find_commit() == "absent"


def test_a_signal_after_the_last_step_stops_what_comes_next_too(tmp_path, monkeypatch):
    """A sweep or a study would begin its next run; what was trained is kept."""
    arguments = base_overrides(tmp_path, name="late", train__steps=2)

    def save_late(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        save_state(*given)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_state", save_late)
        with pytest.raises(Stopped, match="SIGTERM: stopped at step 2, saved"):
            run(BASE, arguments)
    assert not (tmp_path / "late/summary.json").exists()
    trained = losses(tmp_path / "late")
    assert run(BASE, arguments)["steps"] == 2
    assert losses(tmp_path / "late") == trained


def test_a_finished_run_is_left_as_it_is(workdir):
    metrics = (workdir / "fictional-base" / "metrics.jsonl").read_text()
    summary = json.loads((workdir / "fictional-base" / "summary.json").read_text())
    assert run(BASE, base_overrides(workdir)) == summary
    assert (workdir / "fictional-base" / "metrics.jsonl").read_text() == metrics


def test_any_mesh_and_micro_batch_gives_the_same_run(workdir, tmp_path):
    run(BASE, base_overrides(tmp_path, mesh__fsdp=8, mesh__tensor=1, train__micro_batches=1))
    one, other = (losses(folder / "fictional-base") for folder in (workdir, tmp_path))
    assert one.keys() == other.keys()
    for step in one:
        np.testing.assert_allclose(one[step], other[step], rtol=1e-5)


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path, capsys):
    arguments = base_overrides(tmp_path, name="planned")
    before = sorted(tmp_path.iterdir())
    cli.run(train_main, ["train", f"--config={BASE}", *arguments, "--dry_run"], dry_run="")
    printed = capsys.readouterr().out
    for word in ("parameters", "mesh", "8 rows of 64 = 512 tokens", "steps", "GiB", "planned"):
        assert word in printed
    assert re.search(r"there +tokenizer +trained on the text, 600 ids", printed)
    assert sorted(tmp_path.iterdir()) == before


def test_dry_run_tells_what_is_there_and_what_is_missing(workdir, tmp_path, files, capsys):
    train_file, heldout = files
    arguments = file_overrides(workdir, tmp_path, train_file, heldout)
    cli.run(train_main, ["train", f"--config={RPO}", *arguments, "--dry_run"], dry_run="")
    printed = capsys.readouterr().out
    assert "MISSING" not in printed and "model FLOPs" in printed
    assert re.search(rf"there +init_from +{workdir}/fictional-base: 600 ids", printed)
    heldout.unlink()
    arguments.append("--config.init_from=fictional-bose")
    (tmp_path / "runs/one/model").mkdir(parents=True)
    (tmp_path / "runs/one/model/config.json").touch()
    with pytest.raises(SystemExit) as stop:
        cli.run(train_main, ["train", f"--config={RPO}", *arguments, "--dry_run"], dry_run="")
    printed, told = capsys.readouterr()
    assert stop.value.code == 2
    assert re.search(rf"there +data.train {train_file} +1 files", printed)
    assert f"data.heldout: no file matches '{heldout}'" in printed
    assert "fictional-bose/model/config.json is not there" in printed
    assert "runs holds one" in printed
    assert f"see MISSING above: init_from, data.heldout {heldout}" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"mesh__data": 1, "mesh__fsdp": 16, "mesh__tensor": 4, "model__attention": "splash"},
            "the plan wants 64 devices of TPUs, here are 8 of cpu: `python -m rpo_jax.plan ",
        ),
        ({"mesh__fsdp": 3}, "the plan wants a multiple of 6 devices, here are 8 of cpu: "),
        ({"model__attention": "splash"}, "a multiple of 4 devices of TPUs, here are 8 of cpu: "),
    ],
    ids=["a pod", "three", "a TPU"],
)
def test_dry_run_of_a_run_for_other_devices_lists_the_inputs(tmp_path, capsys, changes, told):
    arguments = base_overrides(tmp_path, **changes)
    cli.run(train_main, ["train", f"--config={BASE}", *arguments, "--dry_run"], dry_run="")
    printed = capsys.readouterr().out
    assert re.search(r"there +tokenizer ", printed) and told in printed
    assert sum("the plan wants" in line for line in printed.splitlines()) == 1


def test_dry_run_names_field_and_variable(tmp_path, capsys, monkeypatch):
    for name in ("IGAKUQA_DIR", "QWEN_TOKENIZER"):
        monkeypatch.delenv(name, raising=False)
    config = REPO / "configs/igakuqa_cpt.py"
    arguments = base_overrides(tmp_path)
    with pytest.raises(SystemExit):
        cli.run(train_main, ["train", f"--config={config}", *arguments, "--dry_run"], dry_run="")
    printed, told = capsys.readouterr()
    assert "tokenizer.path=$QWEN_TOKENIZER: the environment variable QWEN_TOKENIZER is" in printed
    assert "set data.igakuqa.directory, or IGAKUQA_DIR" in printed
    assert "see MISSING above: tokenizer, data.source" in told


def write_pairs(path, *lines):
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return path


PAIR = {"id": "1", "prompt": "問題\n答え:", "chosen": "a", "rejected": "b"}


@pytest.fixture
def files(tmp_path):
    train = write_pairs(tmp_path / "train.jsonl", *({**PAIR, "id": str(i)} for i in range(8)))
    heldout = write_pairs(
        tmp_path / "heldout.jsonl", {**PAIR, "id": "h", "prompt": "別の問題\n答え:"}
    )
    return train, heldout


def file_overrides(workdir, tmp_path, train, heldout):
    origin = {"init_from": workdir / "fictional-base", "data__source": "files"}
    data = {"data__train": f"('{train}',)", "data__heldout": f"('{heldout}',)"}
    lengths = {"data__prompt_length": 32, "data__response_length": 8, "train__steps": 4}
    return rpo_overrides(tmp_path / "runs", **origin, **data, **lengths)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "train.jsonl:9: "),
        ({**PAIR, "id": "9", "chosen": ""}, "train.jsonl:9: "),
        ({"id": "9", "prompt": "a", "chosen": "b"}, "rejected"),
        ({**PAIR, "id": "3"}, "train.jsonl:9: "),
        ({**PAIR, "id": "9", "rejected": "a"}, "train.jsonl:9: "),
    ],
    ids=["not-json", "empty-response", "missing-field", "duplicate-id", "equal-responses"],
)
def test_a_bad_line_is_named(workdir, tmp_path, files, capsys, bad, message):
    train_file, heldout = files
    with train_file.open("a") as file:
        file.write(f"{bad if isinstance(bad, str) else json.dumps(bad)}\n")
    told = refuse(capsys, RPO, file_overrides(workdir, tmp_path, train_file, heldout))
    assert message in told
    assert not (tmp_path / "runs" / "fictional-rpo").exists()


def test_long_prompts_are_counted_and_stop_the_run(workdir, tmp_path, files, capsys):
    train_file, heldout = files
    write_pairs(
        train_file,
        *({**PAIR, "id": str(i)} for i in range(7)),
        {**PAIR, "id": "9", "prompt": "長" * 50},
    )
    arguments = file_overrides(workdir, tmp_path, train_file, heldout)
    told = refuse(capsys, RPO, arguments)
    assert "data.max_dropped_share" in told
    assert "prompt_length" in told
    # ... unless that share is allowed
    run(RPO, [*arguments, "--config.data.max_dropped_share=0.2"])


def test_missing_things_are_named(workdir, tmp_path, files, capsys, monkeypatch):
    _, heldout = files
    nowhere = file_overrides(workdir, tmp_path, tmp_path / "no.jsonl", heldout)
    assert str(tmp_path / "no.jsonl") in refuse(capsys, RPO, nowhere)
    orphan = rpo_overrides(tmp_path, init_from="fictional-base")
    assert "fictional-base/model/config.json is not there" in refuse(capsys, RPO, orphan)
    (tmp_path / "fictional-base").mkdir()
    with monkeypatch.context() as here:
        here.chdir(tmp_path)
        assert "for the folder here, ./fictional-base" in refuse(capsys, RPO, orphan)
    assert "never is not a run of this program" in refuse(
        capsys, BASE, base_overrides(tmp_path, name="never"), main=measure_run
    )


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, capsys):
    arguments = base_overrides(tmp_path)
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE | {"vocab_size": 300}))
    told = refuse(capsys, BASE, arguments)
    assert "the tokenizer has ids up to 599, the embedding only 300 rows" in told
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    told = refuse(capsys, BASE, [*arguments, "--config.model.used_vocab_size=400"])
    assert "model.used_vocab_size=400 leaves out ids" in told


def test_what_the_mesh_does_not_divide_is_refused(tmp_path, capsys):
    told = refuse(capsys, BASE, base_overrides(tmp_path, train__batch_rows=6))
    assert "train.batch_rows=6" in told
    assert "data*fsdp=4 does not divide" in told
    told = refuse(capsys, BASE, base_overrides(tmp_path, mesh__fsdp=3))
    assert "8 are there" in told
    told = refuse(capsys, BASE, base_overrides(tmp_path, mesh__fsdp=1, mesh__tensor=8))
    assert "mesh: layers/attention/q/kernel has 4 along 'heads', which tensor=8 does not" in told
    told = refuse(capsys, BASE, base_overrides(tmp_path, mesh__seq=2, data__row_length=65))
    assert "rows of 65 tokens over mesh.seq=2; a multiple of 2 is wanted" in told
    assert "change data.row_length or mesh.seq" in told


def test_a_run_with_another_config_is_not_overwritten(workdir, capsys):
    told = refuse(capsys, BASE, base_overrides(workdir, optim__learning_rate=0.5))
    assert "(optim.learning_rate: 0.003 -> 0.5); give the values before the arrows" in told
    assert "choose another --config.name" in told and "delete" not in told
    # ... which is told before anything is made
    made = set((workdir / "data").iterdir())
    changed = base_overrides(workdir, tokenizer__train_vocab_size=590, optim__b1=0.5)
    assert "optim.b1: 0.9 -> 0.5" in refuse(capsys, BASE, changed)
    assert set((workdir / "data").iterdir()) == made


def test_a_run_whose_data_changed_is_not_gone_on_with(workdir, tmp_path, files, capsys):
    train_file, heldout = files
    arguments = file_overrides(workdir, tmp_path, train_file, heldout)
    run(RPO, arguments)
    metrics = (tmp_path / "runs/fictional-rpo/metrics.jsonl").read_text()
    with train_file.open("a") as file:
        file.write(json.dumps({**PAIR, "id": "more"}) + "\n")
    told = refuse(capsys, RPO, arguments)
    assert "the training data changed since this run began" in told
    assert (tmp_path / "runs/fictional-rpo/metrics.jsonl").read_text() == metrics
    # evaluate knows the run by its config, and reads the run's own tokenizer
    told = refuse(capsys, RPO, [*arguments, "--config.rpo.beta=0.5"], main=measure_run)
    assert "rpo.beta: 0.1 -> 0.5" in told


def test_a_loss_that_is_not_finite_stops_the_run_with_its_records(tmp_path, capsys):
    arguments = base_overrides(tmp_path, optim__learning_rate=1e30, optim__schedule="constant")
    told = refuse(capsys, BASE, arguments)
    assert "on records [" in told
    assert "what is saved is from before it" in told
