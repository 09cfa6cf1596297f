"""Files and folders that are there whole or not at all, on a disk or in a bucket (`gs://`)."""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from rpo_jax.errors import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path lies in a bucket: files appear whole there, and no folder can be renamed."""
    return os.fspath(path).startswith("gs://")


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file on a disk for writing: it is `path` once the context ends without an error.

    Until then it is a hidden file beside it, which only a kill leaves behind; any number of
    processes and hosts may write the same one.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keeps other processes away from what is written bit by bit, while the context is open.

    By an advisory lock on a hidden file beside it, which a kill undoes too. Where a file system
    has no locks, as some mounted buckets, nobody is kept away.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{path}: another process is writing it; wait until that has ended, or stop it"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a small file, text as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        epath.Path(path).write_bytes(data)
        return
    with open_whole(Path(path)) as file:
        file.write(data)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as .npy: by way of memory, for numpy cannot say why a disk refuses it."""
    content = io.BytesIO()
    np.save(content, array)
    write_whole(path, content.getvalue())


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a value as JSON that people can read."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then becomes `folder` by one rename; nothing if an exception comes.

    Where another process made the same folder meanwhile, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.incomplete-", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp makes it private
        place_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def place_folder(draft: Path, folder: Path) -> None:
    """Gives a finished folder its name; where it has been taken meanwhile, nothing happens."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
