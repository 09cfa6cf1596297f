"""The folder in which a conversion works until it is whole, and how it gets its name.

On a disk that folder is `<target>.partial`. A bucket cannot rename folders, so there it is the
target itself. Either holds `unfinished.json` from its first moment to its last: what is being made,
of what. Nothing is deleted, or taken for finished work, without asking that file; on a disk it is
also the lock that keeps the parts of one import out of each other's way.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from rpo_jax.errors import UserError
from rpo_jax.weights.manifest import MANIFEST
from rpo_jax.weights.shards import read_json
from rpo_jax.writing import in_bucket, write_json

MARKER = "unfinished.json"
RECORDS = "finished"


def find_workplace(target: epath.Path) -> epath.Path:
    """Where the work for a target goes on.

    Raises:
        UserError: the target is taken.
    """
    if in_bucket(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        kind = "a folder with something else in it" if target.is_dir() else "a file"
        raise UserError(f"{target}: is there already, {kind}; choose another --target")
    return target.parent / f"{target.name}.partial"


def is_finished(target: epath.Path, files: Iterable[str]) -> bool:
    """Whether any of these files is in a target that nothing is at work on."""
    return not (target / MARKER).exists() and any((target / name).exists() for name in files)


def list_other_files(target: epath.Path, files: dict[str, bytes]) -> list[str]:
    """Names of those of some small files that are missing in a target, or have other bytes."""
    return [
        name
        for name, data in files.items()
        if not (target / name).exists() or (target / name).read_bytes() != data
    ]


def refuse_other(target: epath.Path, other: list[str]) -> None:
    """Refuses a finished target with files that are not what a command would make.

    Raises:
        UserError: names them, if there are any.
    """
    if other:
        raise UserError(
            f"{target}: is there already, and not as this command makes it (missing or other: "
            f"{', '.join(other[:5])}); choose another --target"
        )


def claim(folder: epath.Path, plan: dict[str, Any]) -> None:
    """Makes a folder the workplace for a plan, or checks that it is that one's already.

    Args:
        folder: what `find_workplace` gave.
        plan: JSON values: what is made, of what.

    Raises:
        UserError: it belongs to something else, or to another plan.
    """
    if not (folder / MARKER).exists():
        # A draft of the marker is all that a kill may have left before there was one.
        if folder.exists() and not all(MARKER in path.name for path in folder.iterdir()):
            raise UserError(
                f"{folder}: is there, and nothing that this command left unfinished; move it "
                "away, or choose another --target"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARKER, plan)
    check_plan(folder, plan)


def check_plan(folder: epath.Path, plan: dict[str, Any]) -> None:
    """Refuses a workplace of another plan.

    Raises:
        UserError: names what differs.
    """
    found = read_json(folder / MARKER)
    if found != plan:
        differs = ", ".join(list_differences(found, plan)[:5])
        raise UserError(
            f"{folder}: holds unfinished work on something else (other {differs}); delete it to "
            "begin anew"
        )


def list_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names, down to the innermost, of what differs between two JSON objects."""
    names = []
    for name in sorted(one.keys() | other.keys()):
        before, after = one.get(name), other.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            names += list_differences(before, after)
        elif before != after:
            names.append(name)
    return names


@contextlib.contextmanager
def hold(folder: epath.Path, alone: bool, wait: bool = True) -> Iterator[bool]:
    """Keeps a workplace for this process: alone, or along with others that are not alone.

    A process that ends, however it ends, holds nothing. In a bucket there is no lock, and every
    step that would want one can be done twice.

    Args:
        folder: the workplace.
        alone: whether nobody else may hold it meanwhile.
        wait: for others to let go.

    Yields:
        Whether it is held; False if others hold it, or if it is not there any more.

    Raises:
        UserError: the disk has no locks.
    """
    if in_bucket(folder):
        yield True
        return
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(folder / MARKER, os.O_RDWR)
            stack.callback(os.close, handle)
            kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            # Whoever held it before may have given the folder its name, or another marker.
            held = os.path.samestat(os.fstat(handle), os.stat(folder / MARKER))
        except (FileNotFoundError, BlockingIOError):
            held = False
        except OSError as error:
            raise UserError(f"{folder}: cannot be locked ({error}); use another disk") from error
        yield held


def clear(folder: epath.Path) -> None:
    """Empties a workplace, which stays claimed."""
    for path in folder.iterdir():
        if path.name != MARKER:
            path.rmtree()


def give_name(folder: epath.Path, target: epath.Path) -> None:
    """Makes a workplace, whole now and held alone, the target."""
    if not in_bucket(target):
        for draft in [*folder.glob(".*"), *folder.glob("model/.*")]:  # of a killed `write_whole`
            draft.unlink()
        os.rename(folder, target)
        sync_folder(target.absolute().parent)
    tidy(target)


def tidy(target: epath.Path) -> None:
    """Removes what only unfinished work needs, the marker last."""
    for name in (RECORDS, MARKER):
        with contextlib.suppress(FileNotFoundError):  # in a bucket another part may be at it too
            (target / name).rmtree()


def refuse_unfinished(folder: epath.Path) -> None:
    """Refuses to read what an import or export has not finished.

    Raises:
        UserError: says how to finish it.
    """
    if (folder / MARKER).exists() and not (folder / "model" / MANIFEST).exists():
        raise UserError(
            f"{folder}: `rpo_jax.convert` has not finished it; give that command again first"
        )


def sync_folder(folder: epath.Path) -> None:
    """Makes renames in a local folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
