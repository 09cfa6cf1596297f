"""Weights in and out: every value in its place, byte for byte, in pieces, on any mesh."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from converting import ODD, cut_small, export, import_, run
from etils import epath
from hub import END_OF_TEXT, TIED, random_tensors, read_files, write_checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import SHAPE

from rpo_jax.config import Checkpoint as CheckpointConfig
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.model.qwen2 import Network, abstract_params
from rpo_jax.model.shape import ModelShape, load_shape, shape_to_hf
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.checkpoint import open_checkpoints, save_state
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import TrainState, abstract_weights
from rpo_jax.weights import store
from rpo_jax.weights.exporting import open_weights, verify_checksums
from rpo_jax.weights.names import from_hf, list_tensors
from rpo_jax.weights.shards import read_shard
from rpo_jax.weights.source import open_source
from rpo_jax.weights.store import cut_pieces


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


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


def test_an_export_reads_the_chunks_of_a_run_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax cuts as the mesh does, across our pieces; larger ones then read a chunk only once."""
    monkeypatch.setattr(store, "PIECE_BYTES", 700)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, seq=1, tensor=1))
    params = jax.tree.map(
        lambda leaf: jax.device_put(jax.numpy.ones(leaf.shape, leaf.dtype), leaf.sharding),
        abstract_weights(network(SHAPE), mesh),
    )
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text(json.dumps(shape_to_hf(SHAPE)))
    with open_checkpoints(tmp_path / "run", CheckpointConfig(keep=1)) as checkpoints:
        save_state(checkpoints, TrainState(jax.numpy.int32(0), params, ()))
    weights = open_weights(epath.Path(tmp_path / "run"))
    reads: dict[str, int] = {}
    read = store.Arrays.read

    def count(self: store.Arrays, piece: store.Piece) -> np.ndarray:
        reads[piece.tensor.name] = reads.get(piece.tensor.name, 0) + 1
        return read(self, piece)

    monkeypatch.setattr(store.Arrays, "read", count)
    verify_checksums(weights, 4.0)
    assert set(reads.values()) == {1} and reads.keys() == weights.tensors.keys()
    assert sum(len(list(cut_pieces(tensor, "BF16"))) for tensor in weights.tensors.values()) > 100


def test_another_dtype_keeps_the_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model")
    capsys.readouterr()
    export(tmp_path / "model", tmp_path / "out", "--dtype", "float32")
    assert "config.json: torch_dtype is now float32\n" in capsys.readouterr().out
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


def test_export_stops_at_the_end_of_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    for text in ('{"eos_token_id": 3, "top_p": 1.0}', '{"eos_token_id": [3]}', None):
        (source / "generation_config.json").unlink(missing_ok=True)
        if text:
            (source / "generation_config.json").write_text(text)
        name = f"{len(list(tmp_path.iterdir()))}"
        import_(source, tmp_path / f"model{name}")
        capsys.readouterr()
        export(tmp_path / f"model{name}", tmp_path / f"out{name}")
        assert f"eos_token_id is now {END_OF_TEXT}" in capsys.readouterr().out
        made = json.loads((tmp_path / f"out{name}" / "generation_config.json").read_text())
        assert made["eos_token_id"] == END_OF_TEXT


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model")
    capsys.readouterr()
    for folder in (source, tmp_path / "model"):
        run("inspect", "--source", folder)
        text = capsys.readouterr().out
        assert "BF16" in text and "tie_word_embeddings: True" in text
        assert f"{sum(value.size for value in random_tensors(TIED).values()):,}" in text


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
