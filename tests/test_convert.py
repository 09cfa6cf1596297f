"""Weights in and out: byte for byte, strictly checked, in pieces, resumable, on any mesh."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hub import END_OF_TEXT, TIED, random_tensors, read_files, write_checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import SHAPE

from rpo_jax import convert
from rpo_jax.config import Checkpoint as CheckpointConfig
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.errors import UserError
from rpo_jax.model.qwen2 import Network, abstract_params
from rpo_jax.model.shape import ModelShape, load_shape, shape_to_hf
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.checkpoint import open_checkpoints, save_state
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import TrainState, abstract_weights
from rpo_jax.weights import store
from rpo_jax.weights.exporting import open_weights
from rpo_jax.weights.flow import check_space, count_pieces
from rpo_jax.weights.names import from_hf, list_tensors
from rpo_jax.weights.shards import read_shard
from rpo_jax.weights.source import open_source
from rpo_jax.weights.store import cut_pieces

REPO = Path(__file__).resolve().parents[1]
ODD = replace(SHAPE, vocab_size=101, intermediate_size=37, num_hidden_layers=2)
# Small enough that every matrix of the tiny shapes is cut, some unevenly.
SMALL_PIECE = 700


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PIECE_BYTES", SMALL_PIECE)
    monkeypatch.setattr(store, "_CHUNK", {"D": 8, "N": 2, "K": 2, "F": 5, "V": 6, "H": 99})


def run(*words: object) -> None:
    convert.main([str(word) for word in words])


def import_(source: Path, target: Path, *more: object) -> None:
    run("import", "--source", source, "--target", target, *more)


def export(source: Path, target: Path, *more: object) -> None:
    run("export", "--source", source, "--target", target, "--base", "Qwen/Qwen2.5-0.5B", *more)


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def network(shape: ModelShape, dtype: str = "bfloat16") -> Network:
    return Network(shape, param_dtype=dtype)


# The table


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-72b"])
def test_the_table_fills_every_parameter_once(name: str) -> None:
    shape = load_shape(name)
    filled: dict[str, list[int | None]] = {}
    tensors = list_tensors(shape)
    for tensor in tensors:
        filled.setdefault(tensor.path, []).append(tensor.layer)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(network(shape)))
    ours = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert filled.keys() == ours.keys()
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        layered = tensor.layer is not None
        assert ours[tensor.path].shape[layered:] == tensor.shape
        assert filled[tensor.path] == (list(range(shape.num_hidden_layers)) if layered else [None])


def test_a_projection_lands_head_by_head() -> None:
    """By hand: row n * H + h of HF's q_proj is column (n, h) of ours, and o_proj the other way."""
    heads, width = SHAPE.num_attention_heads, SHAPE.head_dim
    by_name = {tensor.name: tensor for tensor in list_tensors(SHAPE)}
    q = by_name["model.layers.1.self_attn.q_proj.weight"]
    o = by_name["model.layers.1.self_attn.o_proj.weight"]
    values = np.arange(SHAPE.hidden_size**2).reshape(SHAPE.hidden_size, -1)
    for n in range(heads):
        for h in range(width):
            assert (from_hf(values, q)[:, n, h] == values[n * width + h]).all()
            assert (from_hf(values, o)[n, h] == values[:, n * width + h]).all()


@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["even", "odd"])
def test_pieces_cover_every_row_once(shape: ModelShape, small_pieces: None) -> None:
    for tensor in list_tensors(shape):
        rows = np.arange(np.prod(tensor.hf_shape)).reshape(tensor.hf_shape)
        whole = np.full(tensor.shape, -1)
        start = 0
        for piece in cut_pieces(tensor, "F32"):
            part = rows[start : start + piece.hf_shape[0]]
            place = piece.place[tensor.layer is not None :]
            assert (whole[place] == -1).all()
            whole[place] = from_hf(part, tensor)
            start += piece.hf_shape[0]
        assert start == tensor.hf_shape[0]
        assert (whole == from_hf(rows, tensor)).all()


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-72b"])
def test_no_piece_of_a_released_model_is_large_or_tiny(name: str) -> None:
    for tensor in {tensor.path: tensor for tensor in list_tensors(load_shape(name))}.values():
        pieces = list(cut_pieces(tensor, "BF16"))
        assert max(piece.elements for piece in pieces) * 2 <= store.PIECE_BYTES
        assert len(pieces) == 1 or pieces[0].elements * 2 >= store.PIECE_BYTES / 8


# There and back


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [SHAPE, TIED, ODD], ids=["untied", "tied", "odd"])
def test_round_trip_is_byte_identical(
    tmp_path: Path, shape: ModelShape, dtype: str, shards: int, small_pieces: None
) -> None:
    source = write_checkpoint(tmp_path / "in", shape, dtype, shards)
    import_(source, tmp_path / "model")
    run("verify", "--source", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    out = read_files(tmp_path / "out")
    assert b"not for clinical use" in out.pop("README.md").lower().replace(b"-", b" ")
    assert out == read_files(source)
    assert not list(tmp_path.glob("*.partial"))


def test_import_is_what_orbax_loads(tmp_path: Path, small_pieces: None) -> None:
    tensors = random_tensors(SHAPE)
    import_(write_checkpoint(tmp_path / "in", tensors=tensors), tmp_path / "model")
    for fsdp, tensor_cuts in ((1, 1), (4, 2)):
        cuts = MeshConfig(data=1, fsdp=fsdp, seq=1, tensor=tensor_cuts)
        mesh = make_mesh(cuts, jax.devices()[: fsdp * tensor_cuts])
        step, params = load_params(tmp_path / "model", abstract_weights(network(SHAPE), mesh))
        assert step == 0
        for tensor in list_tensors(SHAPE):
            leaf = params
            for key in tensor.path.split("/"):
                leaf = leaf[key]
            assert leaf.dtype == ml_dtypes.bfloat16
            value = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
            want = from_hf(tensors[tensor.name], tensor)
            assert (value.view(np.uint16) == want.view(np.uint16)).all(), tensor.name


def test_bits_survive(tmp_path: Path) -> None:
    """Zeros, as biases begin, and negative zero and subnormals are values too."""
    tensors = random_tensors(TIED)
    for name in tensors:
        if "bias" in name:
            tensors[name][:] = 0
    odd = np.array([0x8000, 0x0001, 0x807F, 0x7F7F], np.uint16).view(ml_dtypes.bfloat16)
    tensors["model.layers.0.mlp.up_proj.weight"].flat[:4] = odd
    source = write_checkpoint(tmp_path / "in", TIED, tensors=tensors)
    import_(source, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    out = read_files(tmp_path / "out")
    assert out.pop("README.md") and out == read_files(source)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, seq=1, tensor=1), jax.devices()[:1])
    _, params = load_params(tmp_path / "model", abstract_weights(network(TIED), mesh))
    assert not np.any(np.asarray(params["layers"]["attention"]["q"]["bias"]))


@pytest.mark.parametrize("trained_in", ["bfloat16", "float32"])
def test_export_of_a_run(tmp_path: Path, trained_in: str, small_pieces: None) -> None:
    """A checkpoint that Orbax wrote in its own layout, without a manifest, newest step of two."""
    net = network(SHAPE, trained_in)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, seq=1, tensor=2))
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text(json.dumps(shape_to_hf(SHAPE)))
    checkpoints = open_checkpoints(tmp_path / "run", CheckpointConfig(keep=2))
    for step in (1, 2):
        params = jax.tree.map(fill, abstract_weights(net, mesh))
        save_state(checkpoints, TrainState(jax.numpy.int32(step), params, ()))
    checkpoints.close()
    for dtype in ("bfloat16", "float32"):
        target = tmp_path / dtype
        export(tmp_path / "run", target, "--dtype", dtype)
        held = load_file(target / "model.safetensors")
        assert held.keys() == {tensor.name for tensor in list_tensors(SHAPE)}
        for tensor in list_tensors(SHAPE):
            leaf = params
            for key in tensor.path.split("/"):
                leaf = leaf[key]
            want = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
            want = np.asarray(jax.numpy.asarray(want).astype(dtype))
            assert held[tensor.name].dtype == want.dtype
            assert (from_hf(held[tensor.name], tensor) == want).all(), tensor.name


def test_another_dtype_keeps_the_shards(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", "--dtype", "float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == before["weight_map"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    for file in set(index["weight_map"].values()):
        wide, narrow = load_file(tmp_path / "out" / file), load_file(source / file)
        assert wide.keys() == narrow.keys()
        for name, value in wide.items():
            assert value.dtype == np.float32 and (value == narrow[name]).all()
    import_(tmp_path / "out", tmp_path / "again")  # and it is a source like any other


def test_export_stops_at_the_end_of_text(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    for text in ('{"eos_token_id": 3, "top_p": 1.0}', '{"eos_token_id": [3]}', None):
        (source / "generation_config.json").unlink(missing_ok=True)
        if text:
            (source / "generation_config.json").write_text(text)
        name = f"{len(list(tmp_path.iterdir()))}"
        import_(source, tmp_path / f"model{name}")
        export(tmp_path / f"model{name}", tmp_path / f"out{name}")
        made = json.loads((tmp_path / f"out{name}" / "generation_config.json").read_text())
        assert made["eos_token_id"] == END_OF_TEXT


def test_the_card_says_whose_it_is_and_what_not_to_do(tmp_path: Path) -> None:
    import_(write_checkpoint(tmp_path / "in", TIED), tmp_path / "model")
    (tmp_path / "results.md").write_text("IgakuQA 2022: 0.5")
    words = ("--source", tmp_path / "model", "--results", tmp_path / "results.md")
    run("export", *words, "--target", tmp_path / "a", "--base", "Qwen/Qwen2.5-72B")
    run("export", *words, "--target", tmp_path / "b", "--base", "Qwen/Qwen2.5-7B")
    run("export", *words, "--target", tmp_path / "c", "--base", "none")
    big, small, none = ((tmp_path / x / "README.md").read_text() for x in "abc")
    assert "license_name: qwen\n" in big and "Built with Qwen" in big
    assert "license: apache-2.0" in small and "base_model: Qwen/Qwen2.5-7B\n" in small
    assert "base_model" not in none
    for card in (big, small, none):
        assert "Do not use it to diagnose" in card and "IgakuQA 2022: 0.5" in card


# What is refused


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
        # Mended, the same command goes on.
        tensors["model.layers.1.self_attn.k_proj.bias"][3] = 0
        write_checkpoint(source, TIED, dtype, tensors=tensors)
        import_(source, tmp_path / "model")
        export(tmp_path / "model", tmp_path / f"out-{dtype}")
        out = read_files(tmp_path / f"out-{dtype}")
        assert out.pop("README.md") and out == read_files(source)
        shutil.rmtree(tmp_path / "model")


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
    (tmp_path / "model").mkdir()
    assert "another --target" in refusal(capsys, "import", *words)
    (tmp_path / "model").rmdir()
    import_(source, tmp_path / "model")
    import_(source, tmp_path / "model")  # nothing to do
    other = write_checkpoint(tmp_path / "other", SHAPE)
    words = ("--source", other, "--target", tmp_path / "model")
    assert "holds another model" in refusal(capsys, "import", *words)
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


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model")
    capsys.readouterr()
    for folder in (source, tmp_path / "model"):
        run("inspect", "--source", folder)
        text = capsys.readouterr().out
        assert "BF16" in text and "tie_word_embeddings: True" in text
        assert f"{sum(value.size for value in random_tensors(TIED).values()):,}" in text


# Interrupted, and shared


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "rpo_jax.convert", *map(str, words)]


ONE_THREAD = {"XLA_FLAGS": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.full
def test_killed_and_repeated_it_ends_byte_identical(tmp_path: Path) -> None:
    shape = replace(SHAPE, num_hidden_layers=40)
    source = write_checkpoint(tmp_path / "in", shape)
    rng = np.random.default_rng(0)
    for words, target in (
        (("import", "--source", source, "--target", tmp_path / "model"), tmp_path / "model"),
        (
            (
                "export",
                "--base",
                "none",
                "--source",
                tmp_path / "model",
                "--target",
                tmp_path / "out",
            ),
            tmp_path / "out",
        ),
    ):
        kills = 0
        partial = target.parent / f"{target.name}.partial"
        while kills < 10:
            process = subprocess.Popen(command(*words), cwd=REPO, env={**os.environ, **ONE_THREAD})
            while not partial.exists() and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0 or target.exists():
                # It won the race: what it made is taken away, and it has to begin again.
                if target == tmp_path / "model":
                    run("verify", "--source", target)
                shutil.rmtree(target)
                continue
            kills += 1
        subprocess.run(command(*words), cwd=REPO, check=True)
        assert not partial.exists()
    run("verify", "--source", tmp_path / "model")
    out = read_files(tmp_path / "out")
    assert out.pop("README.md") and out == read_files(source)


def test_a_repeated_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is recorded as finished is not read again; what changed since is."""
    tensors = random_tensors(TIED)
    last = "model.norm.weight"
    good = tensors[last].copy()
    tensors[last][0] = np.nan
    source = write_checkpoint(tmp_path / "in", TIED, tensors=tensors, shards=2)
    refusal(capsys, "import", "--source", source, "--target", tmp_path / "model")
    done = sorted(path.stem for path in (tmp_path / "model.partial" / "finished").iterdir())
    assert done and last not in done
    other = write_checkpoint(tmp_path / "other", SHAPE)
    message = refusal(capsys, "import", "--source", other, "--target", tmp_path / "model")
    assert "unfinished import of another checkpoint" in message
    tensors[last] = good
    write_checkpoint(source, TIED, tensors=tensors, shards=2)
    import_(source, tmp_path / "model")
    run("verify", "--source", tmp_path / "model")


def test_two_hosts_write_one_folder(tmp_path: Path, small_pieces: None) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    words = ("import", "--source", source, "--target", tmp_path / "model")
    parts = [
        subprocess.Popen(command(*words, f"--part={i}/2"), cwd=REPO, stdout=subprocess.PIPE)
        for i in (2, 1)
    ]
    texts = [process.communicate(timeout=120)[0].decode() for process in parts]
    assert [process.returncode for process in parts] == [0, 0]
    assert any("parameters" in text for text in texts)
    run("verify", "--source", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    out = read_files(tmp_path / "out")
    assert out.pop("README.md") and out == read_files(source)


def test_hosts_need_not_run_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    for i in (1, 2, 3):
        import_(source, tmp_path / "model", f"--part={i}/3")
        assert (tmp_path / "model").exists() == (i == 3)
        assert ("parameters" in capsys.readouterr().out) == (i == 3)
    run("verify", "--source", tmp_path / "model")


RESTORE = """
import sys
import jax
import numpy as np
from pathlib import Path
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from rpo_jax.config import Mesh
from rpo_jax.model.qwen2 import Network
from rpo_jax.model.shape import load_shape
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import abstract_weights
folder = Path(sys.argv[3])
shape = load_shape(str(folder / "model" / "config.json"))
mesh = make_mesh(Mesh(data=1, fsdp=2, seq=1, tensor=2))
wanted = abstract_weights(Network(shape, param_dtype="bfloat16"), mesh)
_, params = load_params(folder, wanted)
for number, leaf in enumerate(jax.tree.leaves(params)):
    for shard in leaf.addressable_shards:
        where = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape)]
        data = np.asarray(shard.data).view(np.uint16)
        np.savez(f"{sys.argv[4]}/{number}-{shard.device.id}.npz", where=where, data=data)
"""


@pytest.mark.full
def test_two_processes_restore_their_own_parts(tmp_path: Path, small_pieces: None) -> None:
    tensors = random_tensors(SHAPE)
    import_(write_checkpoint(tmp_path / "in", tensors=tensors), tmp_path / "model")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    for i in range(2):
        (tmp_path / f"host{i}").mkdir()
    words = [[port, i, tmp_path / "model", tmp_path / f"host{i}"] for i in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", RESTORE, *map(str, w)], cwd=REPO, env=env)
        for w in words
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    one = make_mesh(MeshConfig(data=1, fsdp=1, seq=1, tensor=1), jax.devices()[:1])
    _, whole = load_params(tmp_path / "model", abstract_weights(network(SHAPE), one))
    for number, leaf in enumerate(jax.tree.leaves(whole)):
        want = np.asarray(leaf).view(np.uint16)
        seen = np.zeros(want.shape, bool)
        for file in tmp_path.glob(f"host*/{number}-*.npz"):
            part = np.load(file)
            place = tuple(slice(*span) for span in part["where"])
            assert (part["data"] == want[place]).all()
            seen[place] = True
        assert seen.all()


# The files themselves


def test_headers_read_like_the_library_reads_them(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, shards=1)
    shard = read_shard(epath.Path(source / "model.safetensors"))
    with safe_open(source / "model.safetensors", "numpy") as file:
        assert {entry.name for entry in shard.entries} == set(file.keys())
        for entry in shard.entries:
            tensor = file.get_slice(entry.name)
            assert (tensor.get_dtype(), tuple(tensor.get_shape())) == (entry.dtype, entry.shape)
    assert open_source(epath.Path(source)).shape == SHAPE


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_weights(epath.Path(tmp_path))
