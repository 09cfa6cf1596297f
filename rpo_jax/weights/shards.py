"""Files in the safetensors format: headers, strictly read, and the index over them."""

import json
import math
import os
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from etils import epath

from rpo_jax.errors import UserError
from rpo_jax.writing import in_bucket

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_BYTES = {"BF16": 2, "F32": 4}

_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format
_LONGEST_JSON = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` and `end` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, its header as it stands there, its tensors in file order."""

    file: str
    header: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return 8 + len(self.header.encode()) + sum(entry.size for entry in self.entries)


def read_shard(path: epath.Path) -> Shard:
    """Reads and checks the header of a file.

    Raises:
        UserError: not a safetensors file, cut short, or offsets that overlap or leave holes.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder, a safetensors file is wanted")
    size, _ = stat_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(size - 8, _LONGEST_HEADER):
            raise UserError(
                f"{path}: header of {length} bytes announced in a file of {size}: not safetensors, "
                "or cut short; fetch it again"
            )
        raw = file.read(length)
    if len(raw) < length:
        raise UserError(f"{path}: its header ends after {len(raw)} of {length} bytes")
    shard = parse_header(raw, str(path), path.name)
    if shard.size != size:
        raise UserError(
            f"{path}: {size} bytes long, but its header describes {shard.size}: cut short or "
            "overwritten; fetch it again"
        )
    return shard


def parse_header(raw: bytes, where: str, file: str) -> Shard:
    """Checks a header; the bytes of its tensors must follow each other without hole or overlap.

    Raises:
        UserError: names `where` and the tensor.
    """
    values = _parse_json(raw, f"{where}: header")
    values.pop("__metadata__", None)
    entries = sorted(
        (_parse_entry(where, name, value, 8 + len(raw)) for name, value in values.items()),
        key=lambda entry: (entry.start, entry.end),
    )
    end = 8 + len(raw)
    for entry in entries:
        if entry.start != end:
            raise UserError(
                f"{where}: {entry.name}: starts at byte {entry.start}, but what is before it ends "
                f"at {end}"
            )
        end = entry.end
    return Shard(file, raw.decode(), tuple(entries))


def _parse_entry(where: str, name: str, value: Any, base: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(
            f"{where}: {name}: dtype, shape and data_offsets are wanted, not {value!r:.80}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in tuple(ITEM_BYTES):
        raise UserError(
            f"{where}: {name}: dtype {dtype!r:.80}, {' or '.join(ITEM_BYTES)} is wanted"
        )
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(map(_is_count, numbers)):
            raise UserError(f"{where}: {name}: {key} {numbers!r:.80} is not a list of counts")
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != wanted:
        raise UserError(
            f"{where}: {name}: data_offsets {offsets!r:.80}, but {dtype} {shape!r:.80} takes "
            f"{wanted} bytes"
        )
    return Entry(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def check_plain_name(file: Any, where: str) -> None:
    """Refuses names that could lead out of a folder, before a path is made of them.

    Raises:
        UserError: says where.
    """
    plain = isinstance(file, str) and file.endswith(".safetensors") and file.isprintable()
    if not plain or "/" in file or "\\" in file:
        raise UserError(f"{where}: {file!r:.80} is not the plain name of a shard")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def read_index(directory: epath.Path) -> dict[str, set[str]]:
    """Files of a checkpoint and the tensors each must hold; `{SINGLE: set()}` if it is one file.

    Raises:
        UserError: no weights there, a broken index, or files that it names and are missing, or that
            are there and it does not name.
    """
    present = {path.name for path in directory.glob("*.safetensors")}
    if not (directory / INDEX).exists():
        if not present and any(directory.glob("*.bin")):
            raise UserError(
                f"{directory}: has no safetensors, only PyTorch's .bin; load it with transformers "
                "and save it with `model.save_pretrained(folder)`, which writes safetensors"
            )
        if present != {SINGLE}:
            raise UserError(
                f"{directory}: neither {INDEX} nor a lone {SINGLE}, but {sorted(present)}"
            )
        return {SINGLE: set()}
    where = directory / INDEX
    weight_map = _parse_json(where.read_bytes(), str(where)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}: has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        check_plain_name(file, f"{where}: {tensor}")
        files.setdefault(file, set()).add(tensor)
    for file in sorted(files.keys() | present):
        if file not in present:
            raise UserError(f"{where}: names {file}, which is not in {directory}; fetch it")
        if file not in files:
            raise UserError(f"{directory / file}: is there, but {INDEX} does not name it")
    return files


def read_bytes(file: IO[bytes], start: int, stop: int, where: str) -> np.ndarray:
    """Bytes `start` to `stop` of an open file.

    Read, not mapped: a mapped file that somebody cuts short kills the process.

    Raises:
        UserError: the file is not that long any more.
    """
    file.seek(start)
    raw = np.frombuffer(file.read(stop - start), np.uint8)
    if raw.size < stop - start:
        raise UserError(f"{where}: ends before byte {stop}; was it changed meanwhile?")
    return raw


def stat_file(path: epath.Path) -> tuple[int, int]:
    """Size in bytes, and a number that is another after each change of the file."""
    if in_bucket(path):
        stats = path.stat()
        return stats.length, stats.mtime
    # epath knows whole seconds only, and asks for the owner's name, which a container may lack.
    local = os.stat(path)
    return local.st_size, local.st_mtime_ns


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"{where}: {name!r:.80} is there twice")
            found[name] = value
        return found

    if len(raw) > _LONGEST_JSON:
        raise UserError(f"{where}: {len(raw)} bytes, at most {_LONGEST_JSON} are read")
    try:
        values = json.loads(raw.decode(), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: a JSON object is wanted, not {type(values).__name__}")
    return values


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, or not an object.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    return _parse_json(path.read_bytes(), str(path))


def make_shard(file: str, tensors: list[tuple[str, tuple[int, ...]]], dtype: str) -> Shard:
    """A file to be written, its tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    raw = text.encode()
    # The format wants the data aligned to 8 bytes.
    return parse_header(raw + b" " * (-len(raw) % 8), file, file)


def make_index(shards: list[Shard]) -> bytes:
    """The index over files, as transformers writes it."""
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    size = sum(entry.size for shard in shards for entry in shard.entries)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
