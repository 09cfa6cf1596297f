"""From a model folder to a Hugging Face checkpoint, or through all its bytes to check them.

Work goes on in a workplace (`workplace.py`); a shard gets its name when it is whole, so that a
repeated run goes on with the first shard that is not. In a bucket an object is there whole or not
at all.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from etils import epath

from rpo_jax.errors import UserError
from rpo_jax.model.shape import ModelShape, parse_shape
from rpo_jax.weights.adapters import MergedArrays
from rpo_jax.weights.flow import (
    check_finite,
    check_space,
    count_pieces,
    count_threads,
    cut_blocks,
    read_ahead,
    run_all,
    show_progress,
    write_steadily,
)
from rpo_jax.weights.manifest import Manifest, fingerprint_step, read_manifest
from rpo_jax.weights.names import Tensor, list_tensors
from rpo_jax.weights.release import describe_release
from rpo_jax.weights.shards import (
    INDEX,
    ITEM_BYTES,
    SINGLE,
    Shard,
    make_index,
    make_shard,
    read_json,
    stat_file,
)
from rpo_jax.weights.store import (
    DTYPES,
    Arrays,
    Piece,
    cut_pieces,
    find_checkpoints,
    open_arrays,
)
from rpo_jax.weights.workplace import (
    MARKER,
    check_plan,
    claim,
    find_workplace,
    give_name,
    hold,
    is_finished,
    list_other_files,
    refuse_other,
    refuse_unfinished,
    tidy,
)
from rpo_jax.writing import in_bucket, write_whole

_SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Weights:
    """One step of a model folder, open for reading."""

    folder: epath.Path
    step: int
    shape: ModelShape
    tensors: dict[str, Tensor]
    arrays: Arrays | MergedArrays
    manifest: Manifest | None

    @property
    def folder_of_step(self) -> epath.Path:
        """Where Orbax wrote them."""
        return find_checkpoints(self.folder) / str(self.step)

    @cached_property
    def sums(self) -> dict[str, str]:
        """SHA-256 of each tensor as imported; empty if these are not the imported weights."""
        step = self.folder_of_step
        imported = self.manifest and self.manifest.checkpoint == fingerprint_step(step)
        return self.manifest.sums if self.manifest and imported else {}


def open_weights(folder: epath.Path, step: int | None = None) -> Weights:
    """Opens the newest step of a model folder, or a given one.

    Raises:
        UserError: no such step, unreadable, or not the model that model/config.json describes.
    """
    refuse_unfinished(folder)
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder}: a folder of safetensors; a model folder is wanted, which "
            "`rpo_jax.convert import` makes of it"
        )
    config = folder / "model" / "config.json"
    shape = parse_shape(read_json(config), str(config))
    root = find_checkpoints(folder)
    steps = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.exists() else []
    if not steps or step not in (None, *steps):
        raise UserError(f"{root}: no step {'' if step is None else step}; there are {steps}")
    chosen = steps[-1] if step is None else step
    tensors = list_tensors(shape)
    arrays = open_arrays(root / str(chosen), tensors, shape.num_hidden_layers)
    by_name = {tensor.name: tensor for tensor in tensors}
    return Weights(folder, chosen, shape, by_name, arrays, read_manifest(folder, by_name))


def export_weights(
    weights: Weights,
    target: epath.Path,
    ram_budget_gib: float,
    dtype: str | None,
    papers: dict[str, bytes],
) -> list[str]:
    """Writes a checkpoint that transformers and vLLM load.

    Without a change of dtype, an imported model comes out as it went in: the same shards with the
    same headers, index, config and tokenizer.

    Args:
        weights: what to export.
        target: the folder to make; left alone if it holds this very export already.
        ram_budget_gib: anonymous memory of this process, GiB.
        dtype: "BF16" or "F32"; None keeps that of the checkpoint.
        papers: what goes beside the weights by name, such as the model card; what the model folder
            kept under that name goes before.

    Returns:
        What is not as it was imported in the small files, a line each.

    Raises:
        UserError: damaged or non-finite weights, no space, or a target that is something else.
    """
    dtype = dtype or weights.arrays.dtype
    plan = {"export": {"weights": fingerprint_step(weights.folder_of_step), "dtype": dtype}}
    if not in_bucket(target) and (target / MARKER).exists():
        check_plan(target, plan)  # it was killed with nothing left but this to do
        tidy(target)
        return []
    shards, index = plan_shards(weights, dtype)
    kept, changes = describe_release(weights.folder / "model", dtype)
    files = papers | kept
    if index is not None or shards[0].file == SINGLE:
        files.pop(INDEX, None)
    if index is not None:
        files[INDEX] = index
    if is_finished(target, files):
        other = list_other_files(target, files)
        refuse_other(target, other or _list_other(weights, shards, target, ram_budget_gib, dtype))
        return changes
    folder = find_workplace(target)
    if not folder.exists():
        check_space(target, sum(shard.size for shard in shards))
    claim(folder, plan)
    with hold(folder, alone=True, wait=False) as held:
        if not held:
            raise UserError(f"{folder}: another process is at work there")
        _fill(weights, shards, folder, ram_budget_gib, dtype)
        for file, data in files.items():
            write_whole(folder / file, data)
        give_name(folder, target)
    return changes


def _fill(
    weights: Weights, shards: list[Shard], folder: epath.Path, ram_budget_gib: float, dtype: str
) -> None:
    """Writes those shards that are not there yet."""
    todo = [shard for shard in shards if not (folder / shard.file).exists()]
    total, left = (sum(map(_count_data, group)) for group in (shards, todo))

    def write_shard(shard: Shard, advance: Callable[[int], None]) -> None:
        draft = folder / (shard.file if in_bucket(folder) else f"{shard.file}.draft")
        with write_steadily(draft) as write:
            header = shard.header.encode()
            write(len(header).to_bytes(8, "little") + header)
            for block in _read(weights, shard, dtype, pace):
                write(block)
                advance(len(block))
        if draft.name != shard.file:
            draft.rename(folder / shard.file)

    pace = _set_pace(weights, ram_budget_gib, dtype)
    with show_progress("export", total, total - left) as progress:
        run_all(write_shard, todo, pace.threads, progress)


def _list_other(
    weights: Weights, shards: list[Shard], target: epath.Path, ram_budget_gib: float, dtype: str
) -> list[str]:
    """Names of those shards that a finished target lacks, or holds with other bytes."""
    sizes = {shard.file: shard.size for shard in shards}
    other = [
        file
        for file, size in sizes.items()
        if not (target / file).exists() or stat_file(target / file)[0] != size
    ]
    if other:
        return other

    def compare(shard: Shard, advance: Callable[[int], None]) -> None:
        header = shard.header.encode()
        with (target / shard.file).open("rb") as file:
            same = file.read(8 + len(header))[8:] == header
            for block in _read(weights, shard, dtype, pace):
                same = same and file.read(len(block)) == bytes(block)
                advance(len(block))
        if not same:
            other.append(shard.file)

    pace = _set_pace(weights, ram_budget_gib, dtype)
    with show_progress("compare", sum(map(_count_data, shards))) as progress:
        run_all(compare, shards, pace.threads, progress)
    return sorted(other)


def verify_checksums(weights: Weights, ram_budget_gib: float) -> None:
    """Reads all weights; compares them with the manifest, if they are the imported ones.

    Raises:
        UserError: damaged or non-finite weights.
    """
    shards, _ = plan_shards(weights, weights.arrays.dtype)

    def check_shard(shard: Shard, advance: Callable[[int], None]) -> None:
        for block in _read(weights, shard, weights.arrays.dtype, pace):
            advance(len(block))

    pace = _set_pace(weights, ram_budget_gib, weights.arrays.dtype)
    with show_progress("verify", sum(map(_count_data, shards))) as progress:
        run_all(check_shard, shards, pace.threads, progress)


def plan_shards(weights: Weights, dtype: str) -> tuple[list[Shard], bytes | None]:
    """The files of an export and their index; None if there is none, or the kept one holds."""
    if weights.manifest:
        shards = list(weights.manifest.shards)
        if all(entry.dtype == dtype for shard in shards for entry in shard.entries):
            return shards, None
        files = {shard.file: [entry.name for entry in shard.entries] for shard in shards}
    else:
        files = _deal_out(weights, dtype)
    shards = [
        make_shard(file, [(name, weights.tensors[name].hf_shape) for name in names], dtype)
        for file, names in files.items()
    ]
    return shards, None if list(files) == [SINGLE] else make_index(shards)


def _deal_out(weights: Weights, dtype: str) -> dict[str, list[str]]:
    """Tensors by file, in order, each file of at most `_SHARD_BYTES` or one tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for tensor in weights.tensors.values():
        more = math.prod(tensor.hf_shape) * ITEM_BYTES[dtype]
        if groups[-1] and size + more > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor.name)
        size += more
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def _count_data(shard: Shard) -> int:
    """Bytes of a shard's tensors."""
    return sum(entry.size for entry in shard.entries)


@dataclass(frozen=True)
class _Pace:
    """How the memory is used: shards at once, pieces of each under way, and how large these are."""

    threads: int
    ahead: int
    times: int = 1


def _set_pace(weights: Weights, ram_budget_gib: float, dtype: str) -> _Pace:
    stored = weights.arrays.dtype
    pieces = count_pieces(
        ram_budget_gib,
        weights.tensors.values(),
        stored,
        widest=max(stored, dtype, key=ITEM_BYTES.__getitem__),
        extra=weights.arrays.largest_chunk(),
    )
    ahead = min(pieces, 2)
    for tensor in weights.tensors.values():
        if weights.arrays.chunk_steps(tensor) > next(cut_pieces(tensor, stored)).stop:
            # A run's chunks follow its mesh. All pieces that touch one read it again: few large
            # pieces are better than many at once. Of a shard, no more than four are in memory.
            return _Pace(1, ahead, pieces)
    return _Pace(count_threads(pieces // ahead), ahead)


def _read(weights: Weights, shard: Shard, dtype: str, pace: _Pace) -> Iterator[memoryview]:
    """The data of a shard in the order of the file, in small blocks; checks what it reads."""
    stored = weights.arrays.dtype
    tensors = [weights.tensors[entry.name] for entry in shard.entries]
    digest = hashlib.sha256()

    def read(piece: Piece) -> np.ndarray:
        return np.ascontiguousarray(weights.arrays.read(piece), DTYPES[dtype])

    pieces = [piece for tensor in tensors for piece in cut_pieces(tensor, stored, pace.times)]
    for piece, rows in zip(pieces, read_ahead(read, pieces, pace.ahead), strict=True):
        name = piece.tensor.name
        for block in cut_blocks(rows):
            check_finite(block, f"{weights.folder_of_step}: {name}")
            digest.update(block.data)
            yield block.data.cast("B")
        if piece.stop == piece.tensor.shape[piece.tensor.row_axis]:
            if dtype == stored:
                _check_digest(weights, name, digest.hexdigest())
            digest = hashlib.sha256()


def _check_digest(weights: Weights, tensor: str, found: str) -> None:
    wanted = weights.sums.get(tensor, found)
    if wanted != found:
        raise UserError(
            f"{weights.folder_of_step}: {tensor}: SHA-256 {found}, it was {wanted} when imported: "
            "damaged on disk; import again"
        )
