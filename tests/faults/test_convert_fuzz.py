"""Corrupted checkpoints: each gives a clear error, and leaves nothing that looks like a model."""

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub import TIED, read_files, write_checkpoint
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rpo_jax import convert

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
HANG_S = 120

Damage = Callable[[Path, np.random.Generator], None]


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def edit_header(change: Callable[[dict[str, Any], str, np.random.Generator], object]) -> Damage:
    """Changes the header around one random tensor."""

    def damage(folder: Path, rng: np.random.Generator) -> None:
        header, data = read_header(folder / SHARD)
        change(header, str(rng.choice([name for name in header if name != "__metadata__"])), rng)
        write_header(folder / SHARD, header, data)

    return damage


def edit_index(change: Callable[[dict[str, Any], str, np.random.Generator], object]) -> Damage:
    """Changes the index around one random tensor."""

    def damage(folder: Path, rng: np.random.Generator) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index, str(rng.choice(list(index["weight_map"]))), rng)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def edit_config(change: Callable[[dict[str, Any], str, np.random.Generator], object]) -> Damage:
    """Changes the config around one random number in it."""
    keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    keys += ["num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta"]

    def damage(folder: Path, rng: np.random.Generator) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config, str(rng.choice(keys)), rng)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def rewrite(file: str, change: Callable[[bytes, np.random.Generator], bytes]) -> Damage:
    def damage(folder: Path, rng: np.random.Generator) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes(), rng))

    return damage


def put(key: str, *values: Any) -> Callable[[dict[str, Any], str, np.random.Generator], object]:
    """Sets a field of a tensor's header entry to one of some values."""
    return lambda header, name, rng: header[name].update({key: values[rng.integers(len(values))]})


def shift(by: int) -> Callable[[dict[str, Any], str, np.random.Generator], object]:
    def change(header: dict[str, Any], name: str, rng: np.random.Generator) -> None:
        header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]

    return change


def swap_shards(folder: Path, rng: np.random.Generator) -> None:
    (folder / SHARD).rename(folder / "x")
    (folder / OTHER).rename(folder / SHARD)
    (folder / "x").rename(folder / OTHER)


def put_nan(folder: Path, rng: np.random.Generator) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    _, values = read_header(folder / SHARD)
    place = len(data) - len(values) + 2 * int(rng.integers(len(values) // 2))
    data[place : place + 2] = b"\xc0\x7f"
    (folder / SHARD).write_bytes(data)


def double(key: str, folder: Path) -> None:
    """The same key twice in a JSON object, which a lenient parser reads as the last one."""
    raw = (folder / INDEX).read_text()
    (folder / INDEX).write_text(
        raw.replace('"weight_map": {', f'"weight_map": {{ "{key}": "a",', 1)
    )


def sparse(size: int, length: int) -> Damage:
    """A file that is long and almost empty, announcing a long header."""

    def damage(folder: Path, rng: np.random.Generator) -> None:
        with (folder / SHARD).open("wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(size)

    return damage


OUTSIDE = ("../{}", "/etc/{}", "a/../{}", "..\\{}", "./{}", "{}\0", "", "..", "\n{}", "{}.bin")

# Damage, and how many seeds to do it with; no seed makes any of them harmless.
DAMAGES: dict[str, tuple[int, Damage]] = {
    "shard cut short": (20, rewrite(SHARD, lambda b, rng: b[: rng.integers(len(b))])),
    "shard with more at its end": (5, rewrite(SHARD, lambda b, rng: b + rng.bytes(4))),
    "empty shard": (1, rewrite(SHARD, lambda b, rng: b"")),
    "noise for a shard": (10, rewrite(SHARD, lambda b, rng: rng.bytes(len(b)))),
    "header length": (
        20,
        rewrite(SHARD, lambda b, rng: int(2 ** rng.uniform(0, 63)).to_bytes(8, "little") + b[8:]),
    ),
    "header length of all ones": (1, rewrite(SHARD, lambda b, rng: b"\xff" * 8 + b[8:])),
    "header of 150 MB": (1, sparse(200 * 2**20, 150 * 2**20)),
    "header of 20 MB of zeros": (1, sparse(40 * 2**20, 20 * 2**20)),
    "header nested deep": (
        1,
        lambda f, rng: write_header(f / SHARD, b'{"a":' + b"[" * 10**6, b""),
    ),
    "header a list": (1, lambda f, rng: write_header(f / SHARD, b"[1, 2]  ", b"")),
    "header not UTF-8": (1, lambda f, rng: write_header(f / SHARD, b'{"\xff": 1}', b"")),
    "header with NaN": (1, lambda f, rng: write_header(f / SHARD, b'{"a": NaN}', b"")),
    "dtype": (12, edit_header(put("dtype", "F16", "F64", "I8", "bf16", "", None, 3, [], {}))),
    "dtype of another width": (3, edit_header(put("dtype", "F32"))),
    "shape": (
        12,
        edit_header(
            put("shape", [], [1], [-1, 4], [2**70, 2], "32", None, [1.5], [True, 2], [[1]])
        ),
    ),
    "shape of many numbers": (1, edit_header(put("shape", [2] * 10**5))),
    "offsets": (
        12,
        edit_header(
            put("data_offsets", [], [0], [0, 1, 2], [9, 3], [-2, 0], None, "0", [0, 2**80])
        ),
    ),
    "offsets that overlap": (8, edit_header(shift(-2))),
    "offsets with a hole": (8, edit_header(shift(2))),
    "offsets far beyond": (4, edit_header(shift(2**40))),
    "a field missing": (6, edit_header(lambda h, n, rng: h[n].pop(rng.choice(list(h[n]))))),
    "a field too many": (2, edit_header(lambda h, n, rng: h[n].update(extra=1))),
    "tensor missing in a header": (8, edit_header(lambda h, n, rng: h.pop(n))),
    "tensor renamed": (6, edit_header(lambda h, n, rng: h.update({n + "x": h.pop(n)}))),
    "tensor by a strange name": (2, edit_header(lambda h, n, rng: h.update({"../x": h.pop(n)}))),
    "entry not an object": (3, edit_header(lambda h, n, rng: h.update({n: [1]}))),
    "no index": (1, lambda f, rng: (f / INDEX).unlink()),
    "index cut short": (8, rewrite(INDEX, lambda b, rng: b[: rng.integers(len(b) - 4)])),
    "index of noise": (4, rewrite(INDEX, lambda b, rng: rng.bytes(200))),
    "index without map": (1, edit_index(lambda i, n, rng: i.pop("weight_map"))),
    "index with an empty map": (1, edit_index(lambda i, n, rng: i.update(weight_map={}))),
    "index with a list": (1, edit_index(lambda i, n, rng: i.update(weight_map=[n]))),
    "index with a name twice": (1, lambda f, rng: double("model.norm.weight", f)),
    "index without a tensor": (6, edit_index(lambda i, n, rng: i["weight_map"].pop(n))),
    "index with one too many": (2, edit_index(lambda i, n, rng: i["weight_map"].update(x=SHARD))),
    "index naming a missing file": (
        5,
        edit_index(lambda i, n, rng: i["weight_map"].update({n: "model-9.safetensors"})),
    ),
    "index leading outside": (
        20,
        edit_index(
            lambda i, n, rng: i["weight_map"].update(
                {n: OUTSIDE[rng.integers(len(OUTSIDE))].format(SHARD)}
            )
        ),
    ),
    "index naming no text": (3, edit_index(lambda i, n, rng: i["weight_map"].update({n: 7}))),
    "shard missing": (1, lambda f, rng: (f / SHARD).unlink()),
    "shard a folder": (1, lambda f, rng: ((f / SHARD).unlink(), (f / SHARD).mkdir())[0]),
    "shard too many": (
        1,
        lambda f, rng: shutil.copy(f / SHARD, f / "model-3.safetensors") and None,
    ),
    "shards swapped": (1, swap_shards),
    "NaN": (6, put_nan),
    "no config": (1, lambda f, rng: (f / "config.json").unlink()),
    "config cut short": (6, rewrite("config.json", lambda b, rng: b[: rng.integers(len(b) - 4)])),
    "config without a number": (6, edit_config(lambda c, k, rng: c.pop(k))),
    "config with a larger number": (
        8,
        edit_config(
            lambda c, k, rng: c.update(num_hidden_layers=int(3 + 10 ** rng.uniform(0, 17)))
        ),
    ),
    "config with nonsense": (
        10,
        edit_config(
            lambda c, k, rng: c.update({k: [None, "1", -1, 0, 1e400, [], True][rng.integers(7)]})
        ),
    ),
}
CASES = [(name, seed) for name, (count, _) in DAMAGES.items() for seed in range(count)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fuzz") / "sound", TIED, shards=2)


@contextlib.contextmanager
def limit_time() -> Iterator[None]:
    """Turns a hang into a failure."""

    def fail(*_: Any) -> None:
        raise TimeoutError(f"still at it after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_there_are_enough_cases(sound: Path, tmp_path: Path) -> None:
    assert len(CASES) >= 200
    # And what they damage is sound.
    convert.main(["import", f"--source={sound}", f"--target={tmp_path / 'model'}"])


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_damage_is_refused(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, seed: int
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(sound, folder)
    before = read_files(sound)
    DAMAGES[name][1](folder, np.random.default_rng(seed))
    capsys.readouterr()
    with limit_time(), pytest.raises(SystemExit) as stop:
        convert.main(["import", f"--source={folder}", f"--target={tmp_path / 'model'}"])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "error: " in message and "Traceback" not in message
    assert str(folder) in message and len(message) < 4000
    assert not (tmp_path / "model").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"damaged", "model.partial"}
    # What is left of the work is no model to any command.
    if (tmp_path / "model.partial").exists():
        assert not (tmp_path / "model.partial" / "model" / "manifest.json").exists()
    assert read_files(sound) == before


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits_are_refused_or_kept(
    sound: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bit flipped anywhere in a shard's header: an error, or what the library reads too."""
    rng = np.random.default_rng(seed)
    folder = tmp_path / "damaged"
    shutil.copytree(sound, folder)
    data = bytearray((folder / SHARD).read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[rng.integers(header)] ^= 1 << rng.integers(8)
    (folder / SHARD).write_bytes(data)
    target = tmp_path / "model"
    try:
        with limit_time():
            convert.main(["import", f"--source={folder}", f"--target={target}"])
    except SystemExit as stop:
        assert stop.code == 2
        assert not target.exists()
        return
    with contextlib.suppress(SafetensorError):
        assert load_file(folder / SHARD).keys() == load_file(sound / SHARD).keys()
    convert.main(["export", f"--source={target}", f"--target={tmp_path / 'out'}", "--base=none"])
    assert (tmp_path / "out" / SHARD).read_bytes() == data


MODEL_FILES = ["model/config.json", "model/manifest.json", "model/tokenizer.json"]
MODEL_FILES += ["checkpoints/0/params/_METADATA", "checkpoints/0/params/embed.table/zarr.json"]
MODEL_FILES += ["checkpoints/0/params/layers.mlp.up.kernel/c/0/0/0"]


@pytest.mark.parametrize("file", MODEL_FILES)
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_model_folder_is_refused(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, seed: int
) -> None:
    model = tmp_path / "model"
    convert.main(["import", f"--source={sound}", f"--target={model}"])
    capsys.readouterr()
    data = (model / file).read_bytes()
    rng = np.random.default_rng(seed)
    cut = int(rng.integers(len(data) * 9 // 10))
    (model / file).write_bytes([data[:cut], b"", b"[]", rng.bytes(len(data))][seed])
    with limit_time(), pytest.raises(SystemExit) as stop:
        convert.main(["export", f"--source={model}", f"--target={tmp_path / 'out'}", "--base=none"])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
