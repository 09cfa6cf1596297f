"""Files in: found by globs, read line by line, every complaint with file and line."""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rpo_jax.errors import UserError

_BOM = b"\xef\xbb\xbf"


def find_files(patterns: Sequence[str], suffixes: tuple[str, ...], field: str) -> tuple[Path, ...]:
    """The files that globs match, each once: patterns in order, names sorted within each.

    Args:
        patterns: paths or globs (`**` for all sub-folders); `~` is understood.
        suffixes: endings that a file may have, beside the same with .gz.
        field: of the config, for the complaint.

    Raises:
        UserError: a pattern matches nothing, or a file with another ending.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        names = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
        if not files:
            raise UserError(f"{field}: no file matches {pattern!r}")
        for file in files:
            if not file.name.removesuffix(".gz").endswith(suffixes):
                raise UserError(
                    f"{field}: {file}: cannot be read; {' or '.join(suffixes)} (or with .gz) is "
                    "wanted"
                )
            found[file] = None
    return tuple(found)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a JSONL file, gzipped or not; empty lines are skipped.

    Yields:
        (`file:line`, object)

    Raises:
        UserError: a line is not a JSON object in UTF-8, or the file is damaged.
    """
    with _naming(path), _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(where, line.removeprefix(_BOM) if number == 1 else line)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except ValueError as error:
                raise UserError(f"{where}: not a JSON object ({error})") from error
            if not isinstance(value, dict):
                raise UserError(f"{where}: {type(value).__name__}, a JSON object is wanted")
            yield where, value


def read_whole(path: Path) -> str:
    """The text of a UTF-8 file, gzipped or not.

    Raises:
        UserError: it is not UTF-8, or damaged.
    """
    with _naming(path), _open(path) as file:
        return _decode(str(path), file.read().removeprefix(_BOM))


def take_string(where: str, record: dict[str, Any], key: str) -> str:
    """The string under `key`.

    Raises:
        UserError: it is missing, not a string, or holds half a character (a lone surrogate).
    """
    if key not in record:
        raise UserError(f"{where}: no field {key!r}; it has {', '.join(record) or 'none'}")
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {key!r} is {_shorten(value)}, a string is wanted")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {key!r} holds half a character, a lone surrogate, at {error.start}"
        ) from error
    return value


def digest_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Where each file lies, its size in bytes and its sha256."""
    digests = []
    for path in paths:
        with _naming(path), path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        digests.append({"path": str(path), "bytes": path.stat().st_size, "sha256": sha256})
    return digests


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
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # gzip's complaints do not name the file
        raise UserError(f"{path}: cannot be read ({error})") from error


def _decode(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}: {error.reason})") from error


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
