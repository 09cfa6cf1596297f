"""What convert refuses: it names the thing, says what to do, and leaves nothing half-made."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from converting import import_, refusal, run
from etils import epath
from hub import TIED, random_tensors, write_checkpoint
from tiny import SHAPE

from rpo_jax.errors import UserError
from rpo_jax.model.shape import load_shape
from rpo_jax.weights.exporting import open_weights
from rpo_jax.weights.flow import check_space, count_pieces
from rpo_jax.weights.names import list_tensors


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
