"""From a Hugging Face checkpoint to a model folder.

Work goes on in a workplace (`workplace.py`). Once everything is there, on a disk that folder gets
its name; in a bucket Orbax sees the step once its marker is written. A record of each finished
tensor lets a repeated run go on where one stopped.

Several hosts share the work by `Part`: each takes its own tensors and reads only their bytes; part
1 lays out the folder. They need not run at the same time. A part at work holds the workplace along
with the others. To finish, a part must hold it alone, so nobody is inside when the folder gets its
name. And somebody will: a part that is refused leaves behind one that still holds it and has yet to
try, and the last to try sees the records of all.
"""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

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
)
from rpo_jax.weights.manifest import (
    MANIFEST,
    Manifest,
    dump_manifest,
    fingerprint_step,
    read_manifest,
)
from rpo_jax.weights.names import Tensor
from rpo_jax.weights.shards import ITEM_BYTES, Entry, Shard, read_bytes
from rpo_jax.weights.source import KEPT_FILES, Source, fingerprint_files
from rpo_jax.weights.store import (
    CHECKPOINTS,
    DTYPES,
    PIECE_BYTES,
    Arrays,
    create,
    cut_pieces,
    open_arrays,
)
from rpo_jax.weights.workplace import (
    RECORDS,
    check_plan,
    claim,
    clear,
    find_workplace,
    give_name,
    hold,
    list_differences,
    tidy,
)
from rpo_jax.writing import in_bucket, write_whole

_LAYOUT = "layout"  # the record that the arrays are there to be filled
_MARKER = "commit_success.txt"  # what Orbax looks for in a bucket
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Part:
    """The share of one of several hosts: number `index` of `count`, counted from 1."""

    index: int = 1
    count: int = 1


def import_weights(source: Source, target: epath.Path, ram_budget_gib: float, part: Part) -> bool:
    """Writes this host's part of a model folder.

    Args:
        source: a checked checkpoint.
        target: the model folder; left alone if it holds this very import already.
        ram_budget_gib: anonymous memory of this process, GiB.
        part: this host's share.

    Returns:
        Whether the folder is complete; False while other parts have work to do.

    Raises:
        UserError: bad data, no space, a target that exists, leftovers of another import, or a
            source that changed meanwhile.
    """
    files = fingerprint_files(source)
    if _is_done(source, files, target):
        with hold(target, alone=True) as held:
            if held:
                tidy(target)
        return True
    folder = find_workplace(target)
    threads = count_threads(count_pieces(ram_budget_gib, source.tensors, source.dtype))
    plan = {"import": files}
    if part.index == 1:
        _lay_out(source, target, folder, plan)
    else:
        _wait_for(folder / RECORDS / _LAYOUT)
    with hold(folder, alone=False) as held:
        if held:
            check_plan(folder, plan)
            _fill(source, folder, threads, part)
            changed = list_differences(files, fingerprint_files(source))
            if changed:
                raise UserError(
                    f"{source.name}: {', '.join(changed[:5])} changed while it was read; delete "
                    f"{folder} and begin anew"
                )
    with hold(folder, alone=True, wait=False) as held:
        if held:
            _finish(source, files, target, folder)
    return _is_done(source, files, target)


def _is_done(source: Source, files: dict[str, str], target: epath.Path) -> bool:
    manifest = read_manifest(target)
    if manifest is None:
        return False
    changed = list_differences(manifest.files, files)
    # Of a local shard whose time of change alone is another, the bytes tell.
    touched = [name for name in changed if _is_touched(manifest.files, files, name)]
    if changed == touched:
        changed = _list_other(source, manifest, touched)
    if changed:
        raise UserError(
            f"{target}: holds an import of {manifest.source} already, and {source.name} has "
            f"another {', '.join(changed[:5])}; choose another --target"
        )
    if not _step(target).exists() or fingerprint_step(_step(target)) != manifest.checkpoint:
        raise UserError(f"{target}: holds a run that began with this; choose another --target")
    return True


def _is_touched(before: dict[str, str], after: dict[str, str], name: str) -> bool:
    """Whether a fingerprint of `fingerprint_files` differs in the time of change alone."""
    head, found, _ = before.get(name, "").partition(" bytes, ")
    return bool(found) and after.get(name, "").startswith(head + found)


def _list_other(source: Source, manifest: Manifest, files: list[str]) -> list[str]:
    """Those of some shards that hold other bytes than were imported."""
    shards = [shard for shard in source.shards if shard.file in files]
    other = []

    def compare(shard: Shard, advance: Callable[[int], None]) -> None:
        path = source.directory / shard.file
        with path.open("rb") as file:
            for entry in shard.entries:
                digest = hashlib.sha256()
                for start in range(entry.start, entry.end, PIECE_BYTES):
                    raw = read_bytes(file, start, min(start + PIECE_BYTES, entry.end), str(path))
                    digest.update(raw.data)
                    advance(len(raw))
                if digest.hexdigest() != manifest.sums[entry.name]:
                    other.append(shard.file)
                    return

    total = sum(entry.size for shard in shards for entry in shard.entries)
    if shards:
        with show_progress("compare", total) as progress:
            run_all(compare, shards, count_threads(len(shards)), progress)
    return sorted(other)


def _lay_out(source: Source, target: epath.Path, folder: epath.Path, plan: dict[str, Any]) -> None:
    """Makes the folder, its arrays still empty, unless it is there."""
    if not folder.exists():
        check_space(target, sum(shard.size for shard in source.shards))
    claim(folder, plan)
    if (folder / RECORDS / _LAYOUT).exists():
        return
    with hold(folder, alone=True) as held:
        if not held or (folder / RECORDS / _LAYOUT).exists():  # somebody else was quicker
            return
        clear(folder)
        (folder / "model").mkdir(parents=True)
        (folder / RECORDS).mkdir()
        for file in KEPT_FILES:
            if (source.directory / file).exists():
                write_whole(folder / "model" / file, (source.directory / file).read_bytes())
        create(folder, source.tensors, source.shape.num_hidden_layers, source.dtype)
        if in_bucket(folder):
            (_step(folder) / _MARKER).unlink()
        write_whole(folder / RECORDS / _LAYOUT, b"")


def _wait_for(path: epath.Path) -> None:
    give_up = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > give_up:
            raise UserError(f"{path} is not there after {_PATIENCE_S:.0f} s; start --part=1/n too")
        time.sleep(0.2)


def _step(folder: epath.Path) -> epath.Path:
    return folder / CHECKPOINTS / "0"


def _fill(source: Source, folder: epath.Path, threads: int, part: Part) -> None:
    """Copies those tensors of this part that are not yet recorded as finished."""
    entries = source.entries
    # The largest first: dealt out in turn they balance, and no long one is left for the end.
    ranked = sorted(source.tensors, key=lambda tensor: -entries[tensor.name][1].size)
    mine = ranked[part.index - 1 :: part.count]
    records = folder / RECORDS
    finished = {path.name for path in records.iterdir()}
    todo = [tensor for tensor in mine if tensor.name not in finished]
    total = sum(entries[tensor.name][1].size for tensor in mine)
    left = sum(entries[tensor.name][1].size for tensor in todo)
    arrays = open_arrays(_step(folder), source.tensors, source.shape.num_hidden_layers)

    def copy(tensor: Tensor, advance: Callable[[int], None]) -> None:
        file, entry = entries[tensor.name]
        digest = _copy(source.directory / file, entry, tensor, arrays, advance)
        write_whole(records / tensor.name, digest)

    with show_progress("import", total, total - left) as progress:
        run_all(copy, todo, threads, progress)


def _copy(
    path: epath.Path, entry: Entry, tensor: Tensor, arrays: Arrays, advance: Callable[[int], None]
) -> str:
    """Copies one tensor; SHA-256 of its bytes in the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = entry.start
        for piece in cut_pieces(tensor, entry.dtype):
            stop = start + piece.elements * ITEM_BYTES[entry.dtype]
            raw = read_bytes(file, start, stop, str(path))
            rows = raw.view(DTYPES[entry.dtype]).reshape(piece.hf_shape)
            for block in cut_blocks(rows):
                digest.update(block.data)
                check_finite(block, f"{path}: {tensor.name}")
            arrays.write(piece, rows)
            advance(stop - start)
            start = stop
    return digest.hexdigest()


def _finish(source: Source, files: dict[str, str], target: epath.Path, folder: epath.Path) -> None:
    """Makes the folder, held alone, the target, if no part has anything left to do."""
    records = folder / RECORDS
    names = [tensor.name for tensor in source.tensors]
    try:
        if not {path.name for path in records.iterdir()}.issuperset(names):
            return
        with ThreadPoolExecutor(16) as pool:
            sums = dict(
                zip(names, pool.map(lambda n: (records / n).read_text(), names), strict=True)
            )
    except FileNotFoundError:
        if not in_bucket(folder):
            raise
        return  # in a bucket, records go when another part has finished
    checkpoint = fingerprint_step(_step(folder))
    manifest = Manifest(source.name, source.commit, files, checkpoint, source.shards, sums)
    if in_bucket(target):
        (_step(folder) / _MARKER).write_text("complete\n")
    write_whole(folder / "model" / MANIFEST, dump_manifest(manifest))
    give_name(folder, target)
