"""From a Hugging Face checkpoint to a model folder.

Work goes on in `<target>.partial` until everything is there; then that folder gets its name. In a
bucket, where folders cannot be renamed, it goes on in place, and Orbax sees the step once its
marker is written, last of all. A record of each finished tensor lets a repeated run go on where one
stopped.

Several hosts share the work by `Part`: each takes its own tensors and reads only their bytes; part
1 lays out the folder, and whoever finishes last gives it its name. They need not run at the same
time.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from etils import epath

from rpo_jax.errors import UserError
from rpo_jax.weights.flow import (
    check_finite,
    check_space,
    count_pieces,
    count_threads,
    cut_blocks,
    run_all,
    show_progress,
    sync_folder,
    write_whole,
)
from rpo_jax.weights.manifest import (
    MANIFEST,
    Manifest,
    dump_manifest,
    fingerprint_step,
    read_manifest,
)
from rpo_jax.weights.names import Tensor
from rpo_jax.weights.shards import ITEM_BYTES, Entry, is_remote, open_data
from rpo_jax.weights.source import KEPT_FILES, Source
from rpo_jax.weights.store import (
    CHECKPOINTS,
    DTYPES,
    Arrays,
    create,
    cut_pieces,
    open_arrays,
)

_PLAN = "import.json"
_RECORDS = "finished"
_MARKER = "commit_success.txt"  # what Orbax looks for in a bucket
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Part:
    """The share of one of several hosts: number `index` of `count`, counted from 1."""

    index: int = 1
    count: int = 1


def import_weights(
    source: Source, target: epath.Path, ram_budget_gib: float, part: Part, name: str
) -> bool:
    """Writes this host's part of a model folder.

    Args:
        source: a checked checkpoint.
        target: the model folder; left alone if it holds this very import already.
        ram_budget_gib: anonymous memory of this process, GiB.
        part: this host's share.
        name: what to call the source in the manifest, e.g. its hub id.

    Returns:
        Whether the folder is complete; False while other parts are at work.

    Raises:
        UserError: bad data, no space, a target that exists, or leftovers of another import.
    """
    if _is_done(source, target):
        _tidy(target)
        return True
    if not is_remote(target) and target.exists():
        raise UserError(
            f"{target}: is there already and no finished import; choose another --target"
        )
    threads = count_threads(count_pieces(ram_budget_gib, source.tensors, source.dtype))
    folder = target if is_remote(target) else target.parent / f"{target.name}.partial"
    if part.index == 1:
        _lay_out(source, target, folder)
    else:
        _wait_for(folder / _PLAN)
    _check_plan(source, folder)
    _fill(source, folder, threads, part)
    try:
        return _finish(source, target, folder, name)
    except FileNotFoundError:
        # Another part finished at the same moment and has just given the folder its name.
        if _is_done(source, target):
            return True
        raise


def _is_done(source: Source, target: epath.Path) -> bool:
    manifest = read_manifest(target)
    if manifest is None:
        return False
    if manifest.digest != source.digest:
        raise UserError(f"{target}: holds another model already; choose another --target")
    return True


def _lay_out(source: Source, target: epath.Path, folder: epath.Path) -> None:
    """Makes the folder, its arrays still empty, unless it is there; the plan is written last."""
    if (folder / _PLAN).exists():
        return
    check_space(target, sum(shard.size for shard in source.shards))
    if folder.exists():
        folder.rmtree()
    (folder / "model").mkdir(parents=True)
    (folder / _RECORDS).mkdir()
    for file in KEPT_FILES:
        if (source.directory / file).exists():
            write_whole(folder / "model" / file, (source.directory / file).read_bytes())
    create(folder, source.tensors, source.shape.num_hidden_layers, source.dtype)
    if is_remote(folder):
        (_step(folder) / _MARKER).unlink()
    write_whole(folder / _PLAN, json.dumps({"digest": source.digest}).encode())


def _wait_for(path: epath.Path) -> None:
    give_up = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > give_up:
            raise UserError(f"{path} is not there after {_PATIENCE_S:.0f} s; start --part=1/n too")
        time.sleep(0.2)


def _check_plan(source: Source, folder: epath.Path) -> None:
    if json.loads((folder / _PLAN).read_text())["digest"] != source.digest:
        raise UserError(
            f"{folder}: holds an unfinished import of another checkpoint; delete it to begin anew"
        )


def _step(folder: epath.Path) -> epath.Path:
    return folder / CHECKPOINTS / "0"


def _fill(source: Source, folder: epath.Path, threads: int, part: Part) -> None:
    """Copies those tensors of this part that are not yet recorded as finished."""
    entries = source.entries
    # The largest first: dealt out in turn they balance, and no long one is left for the end.
    ranked = sorted(source.tensors, key=lambda tensor: -entries[tensor.name][1].size)
    mine = ranked[part.index - 1 :: part.count]
    modified = {s.file: (source.directory / s.file).stat().mtime for s in source.shards}
    records = folder / _RECORDS

    def finished(tensor: Tensor) -> bool:
        path = records / f"{tensor.name}.json"
        # A file that changed since the tensor was copied has to be read again.
        changed = modified[entries[tensor.name][0]]
        return path.exists() and json.loads(path.read_text())["modified"] == changed

    todo = [tensor for tensor in mine if not finished(tensor)]
    total = sum(entries[tensor.name][1].size for tensor in mine)
    left = sum(entries[tensor.name][1].size for tensor in todo)
    arrays = open_arrays(_step(folder), source.tensors, source.shape.num_hidden_layers)

    def copy(tensor: Tensor, advance: Callable[[int], None]) -> None:
        file, entry = entries[tensor.name]
        digest = _copy(source.directory / file, entry, tensor, arrays, advance)
        record = {"sha256": digest, "modified": modified[file]}
        write_whole(records / f"{tensor.name}.json", json.dumps(record).encode())

    with show_progress("import", total, total - left) as progress:
        run_all(copy, todo, threads, progress)


def _copy(
    path: epath.Path, entry: Entry, tensor: Tensor, arrays: Arrays, advance: Callable[[int], None]
) -> str:
    """Copies one tensor; SHA-256 of its bytes in the file."""
    digest = hashlib.sha256()
    with contextlib.closing(open_data(path)) as data:
        start = entry.start
        for piece in cut_pieces(tensor, entry.dtype):
            stop = start + piece.elements * ITEM_BYTES[entry.dtype]
            raw = data.read(start, stop)
            rows = raw.view(DTYPES[entry.dtype]).reshape(piece.hf_shape)
            for block in cut_blocks(rows):
                digest.update(block.data)
                check_finite(block, f"{path}: {tensor.name}")
            arrays.write(piece, rows)
            advance(stop - start)
            start = stop
    return digest.hexdigest()


def _finish(source: Source, target: epath.Path, folder: epath.Path, name: str) -> bool:
    """Gives the folder its name, if no part has anything left to do."""
    records = folder / _RECORDS
    if {path.name for path in records.iterdir()} < {f"{t.name}.json" for t in source.tensors}:
        return False
    sums = {
        tensor.name: json.loads((records / f"{tensor.name}.json").read_text())["sha256"]
        for tensor in source.tensors
    }
    checkpoint = fingerprint_step(_step(folder))
    manifest = Manifest(name, source.digest, checkpoint, source.shards, sums)
    if is_remote(target):
        (_step(folder) / _MARKER).write_text("complete\n")
    write_whole(folder / "model" / MANIFEST, dump_manifest(manifest))
    if not is_remote(target):
        folder.rename(target)
        sync_folder(target.absolute().parent)
    _tidy(target)
    return True


def _tidy(target: epath.Path) -> None:
    """Removes what only an unfinished import needs."""
    if (target / _RECORDS).exists():
        (target / _RECORDS).rmtree(missing_ok=True)
    (target / _PLAN).unlink(missing_ok=True)
