"""What convert refuses: it names the thing, says what to do, and leaves nothing half-made."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from converting import import_, refusal, run
from etils import epath
from hub import TIED, random_tensors, read_files, write_checkpoint
from tiny import SHAPE

from rpo_jax.errors import UserError
from rpo_jax.model.shape import load_shape
from rpo_jax.training.checkpoint import open_existing
from rpo_jax.weights.exporting import open_weights
from rpo_jax.weights.flow import check_space, count_pieces
from rpo_jax.weights.names import list_tensors
from rpo_jax.weights.source import open_source


def test_a_source_is_checked_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(TIED)
    gate = "model.layers.0.mlp.gate_proj.weight"
    extra = "model.layers.0.mlp.gate_proj.bias"
    cases: dict[str, dict[str, np.ndarray]] = {
        "is missing": {name: value for name, value in tensors.items() if name != gate},
        "not a tensor of this model": tensors | {extra: np.ones(3, ml_dtypes.bfloat16)},
        "config.json wants": tensors | {gate: tensors[gate][1:]},
        "dtype F32": tensors | {gate: tensors[gate].astype(np.float32)},
        "dtype 'F16'": tensors | {gate: tensors[gate].astype(np.float16)},
    }
    for number, (words, broken) in enumerate(cases.items()):
        source = write_checkpoint(tmp_path / f"in{number}", TIED, tensors=broken, shards=1)
        message = refusal(capsys, "import", "--source", source, "--target", tmp_path / "model")
        assert words in message and "gate_proj" in message, message
        assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    for dtype in ("BF16", "F32"):
        tensors = random_tensors(TIED, dtype)
        tensors["model.layers.1.self_attn.k_proj.bias"][3] = value
        source = write_checkpoint(tmp_path / dtype, TIED, dtype, tensors=tensors)
        message = refusal(capsys, "import", "--source", source, "--target", tmp_path / "model")
        assert "model.layers.1.self_attn.k_proj.bias" in message and "-of-00003" in message
        assert ("NaN" if np.isnan(value) else "infinity") in message
        assert not (tmp_path / "model").exists()
        shutil.rmtree(tmp_path / "model.partial")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_sliding_window", True),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("model_type", "llama"),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("architectures", ["Qwen2ForSequenceClassification"]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("hidden_size", float("inf")),
        ("rms_norm_eps", "1e-6"),
    ],
)
def test_another_architecture_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    message = refusal(capsys, "import", "--source", source, "--target", tmp_path / "model")
    assert "config.json" in message and (key[:4] in message or "layers" in message), message
    assert not list(tmp_path.glob("model*"))


def test_damage_on_disk_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_(write_checkpoint(tmp_path / "in", TIED), tmp_path / "model")
    chunk = tmp_path / "model/checkpoints/0/params/layers.mlp.down.kernel/c/1/0/0"
    data = bytearray(chunk.read_bytes())
    data[10] ^= 1
    chunk.write_bytes(data)
    for words in (("verify",), ("export", "--target", tmp_path / "out", "--base", "none")):
        message = refusal(capsys, *words, "--source", tmp_path / "model")
        assert "model.layers.1.mlp.down_proj.weight" in message and "SHA-256" in message
    assert not (tmp_path / "out").exists()
    chunk.unlink()
    assert "mlp/down/kernel" in refusal(capsys, "verify", "--source", tmp_path / "model")


def test_what_cannot_be_done_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    words = ("--source", source, "--target", tmp_path / "model")
    assert "0.01 is too small" in refusal(capsys, "import", *words, "--ram_budget_gib", "0.01")
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    import_(source, tmp_path / "model")
    import_(source, tmp_path / "model")  # nothing to do
    other = write_checkpoint(tmp_path / "other", SHAPE)
    words = ("--source", other, "--target", tmp_path / "model")
    assert "holds an import of" in refusal(capsys, "import", *words)
    words = ("--source", tmp_path / "model", "--target", tmp_path / "out")
    assert "Qwen/Qwen2.5-72B" in refusal(capsys, "export", *words)
    assert "no step 7" in refusal(capsys, "export", *words, "--base", "none", "--step", "7")
    assert "no such folder" in refusal(capsys, "import", "--source", "x", "--target", "y")
    with pytest.raises(SystemExit):
        run("import", *words, "--part", "3/2")


def test_space_is_checked_before_starting(tmp_path: Path) -> None:
    stats = os.statvfs(tmp_path)
    free = stats.f_bavail * stats.f_frsize
    check_space(epath.Path(tmp_path / "a" / "b"), free // 2)
    with pytest.raises(UserError, match="GiB are free"):
        check_space(epath.Path(tmp_path / "a" / "b"), 2 * free)


def test_the_budget_decides_how_many_pieces_are_under_way() -> None:
    tensors = list_tensors(load_shape("qwen2.5-72b"))
    assert count_pieces(0.7, tensors, "BF16") == 1
    assert 1 < count_pieces(0.9, tensors, "BF16") < count_pieces(64.0, tensors, "BF16")
    with pytest.raises(UserError, match="too small: this model needs 0"):
        count_pieces(0.5, tensors, "BF16")
    with pytest.raises(UserError, match="needs 36"):
        count_pieces(4.0, tensors, "BF16", extra=36 * 2**30)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_weights(epath.Path(tmp_path))


def test_a_target_keeps_what_it_was_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same layout with other values, or another tokenizer, is another source."""
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model")
    held = read_files(tmp_path / "model")
    import_(source, tmp_path / "model")  # the same again
    os.utime(source / "model-00001-of-00003.safetensors", (1, 1))
    import_(source, tmp_path / "model")  # the same bytes, later
    words = ("import", "--source", source, "--target", tmp_path / "model")
    write_checkpoint(source, TIED, seed=1)
    message = refusal(capsys, *words)
    assert "has another model-00001-of-00003.safetensors" in message and "--target" in message
    shutil.rmtree(tmp_path / "model")
    import_(source, tmp_path / "model")
    (source / "tokenizer_config.json").write_text("{}")
    assert "has another tokenizer_config.json" in refusal(capsys, *words)
    (source / "LICENSE").write_text("new")
    assert "has another LICENSE, tokenizer_config.json" in refusal(capsys, *words)
    assert read_files(tmp_path / "model").keys() == held.keys()


def test_a_finished_export_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_(write_checkpoint(tmp_path / "in", TIED), tmp_path / "model")
    out = tmp_path / "out"
    words = ("export", "--base=none", "--source", tmp_path / "model", "--target", out)
    run(*words)
    (out / "LICENSE").write_text("what the command asks for")
    shard = out / "model-00002-of-00003.safetensors"
    held = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(*words)
    assert held == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    message = refusal(capsys, *words, "--dtype=float32")
    assert "missing or other: README.md, config.json" in message
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"missing or other: {shard.name})" in refusal(capsys, *words)
    shard.unlink()
    assert f"missing or other: {shard.name})" in refusal(capsys, *words)
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "a folder with something else in it" in refusal(capsys, *words)


def test_unfinished_work_is_resumed_by_its_own_source_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model", "--part=1/2")
    half = read_files(tmp_path / "model.partial")
    other = write_checkpoint(tmp_path / "other", TIED, seed=1)
    for part in ("2/2", "1/1", "1/2"):
        words = ("--source", other, "--target", tmp_path / "model", f"--part={part}")
        assert "something else" in refusal(capsys, "import", *words)
    assert read_files(tmp_path / "model.partial") == half
    import_(source, tmp_path / "model", "--part=2/2")
    run("verify", "--source", tmp_path / "model")


def test_nothing_is_deleted_that_is_not_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model")
    for name, words in (
        ("again", ("import", "--source", source)),
        ("out", ("export", "--base=none", "--source", tmp_path / "model")),
    ):
        mine = tmp_path / f"{name}.partial"
        mine.mkdir()
        (mine / "thesis.tex").write_text("years of work")
        message = refusal(capsys, *words, "--target", tmp_path / name)
        assert "move it away" in message and str(mine) in message
        assert (mine / "thesis.tex").read_text() == "years of work"
        shutil.rmtree(mine)
        (tmp_path / name).write_text("a file")
        assert "is there already, a file" in refusal(capsys, *words, "--target", tmp_path / name)
        assert (tmp_path / name).read_text() == "a file" and not mine.exists()
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()  # an empty folder is as good as none
        run(*words, "--target", tmp_path / name)
        with pytest.raises(SystemExit):
            run(*words, "--target", "")
        assert "--target: is empty" in capsys.readouterr().err


def test_unfinished_is_no_model_to_anyone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model", "--part=1/2")
    half = tmp_path / "model.partial"
    for words in (("inspect",), ("verify",), ("export", "--base=none", "--target", tmp_path / "x")):
        assert "has not finished it" in refusal(capsys, *words, "--source", half)
    with pytest.raises(UserError, match="has not finished it"):
        open_existing(half)
    with pytest.raises(UserError, match="has not finished it"):
        open_source(epath.Path(half))


def test_a_source_may_not_change_under_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short or touched while it is read: an error, not a dead process or a mixed model."""
    source = write_checkpoint(tmp_path / "in", TIED, shards=1)
    shard = source / "model.safetensors"
    whole = shard.read_bytes()
    replace, words = os.replace, ("--source", source, "--target", tmp_path / "model")

    def then(change: Callable[[], object]) -> None:
        """Has `change` done once the first tensor is finished."""

        def watch(start: str, end: str) -> None:
            replace(start, end)
            if Path(end).name.startswith("model."):
                change()

        monkeypatch.setattr(os, "replace", watch)

    then(lambda: os.truncate(shard, 2000))
    message = refusal(capsys, "import", *words)
    assert str(shard) in message and "was it changed meanwhile?" in message
    shutil.rmtree(tmp_path / "model.partial")
    monkeypatch.setattr(os, "replace", replace)
    shard.write_bytes(whole)
    then(lambda: os.utime(shard, (1, 1)))
    message = refusal(capsys, "import", *words)
    assert "model.safetensors changed while it was read" in message
    assert not (tmp_path / "model").exists()


def test_what_was_meant_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    assert "a folder of safetensors; a model folder" in refusal(
        capsys, "verify", "--source", source
    )
    old = write_checkpoint(tmp_path / "old", TIED)
    for path in [*old.glob("*.safetensors"), *old.glob("*.index.json")]:
        path.unlink()
    (old / "pytorch_model.bin").touch()
    message = refusal(capsys, "import", "--source", old, "--target", tmp_path / "model")
    assert "only PyTorch's .bin" in message and "save_pretrained" in message
    import_(source, tmp_path / "model")
    (tmp_path / "model" / "checkpoints" / "0").rename(tmp_path / "model" / "checkpoints" / "5")
    message = refusal(capsys, "import", "--source", source, "--target", tmp_path / "model")
    assert "holds a run" in message


def test_a_source_without_a_tokenizer_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "whole")
    assert "tokenizer" not in capsys.readouterr().err
    (source / "tokenizer.json").unlink()
    import_(source, tmp_path / "model")
    said = capsys.readouterr().err
    assert "holds no tokenizer.json or tokenizer.model" in said
    assert f"into {tmp_path}/model/model afterwards" in said


def test_a_folder_is_no_hub_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder named like `Qwen/Qwen2.5-72B` says nothing about a licence."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "Qwen" / "Qwen2.5-72B", TIED)
    run("import", "--source=Qwen/Qwen2.5-72B", "--target=model")
    assert "the card must name" in refusal(capsys, "export", "--source=model", "--target=out")
    for base in ("None", "none"):
        run("export", "--source=model", f"--target=out-{base}", f"--base={base}")
        assert "base_model" not in (tmp_path / f"out-{base}" / "README.md").read_text()


def test_the_bar_ends_where_it_should(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_(write_checkpoint(tmp_path / "in", TIED), tmp_path / "model")
    said = capsys.readouterr().err
    assert "import: 100%" in said and "OCDBT" not in said
    run("verify", "--source", tmp_path / "model")
    assert "verify: 100%" in capsys.readouterr().err
    run("export", "--source", tmp_path / "model", "--target", tmp_path / "out", "--base=none")
    assert "export: 100%" in capsys.readouterr().err
