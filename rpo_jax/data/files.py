"""Files in: found by globs, read line by line, every complaint with file and line.

Files lie on a disk or in a bucket (`gs://`, extra `gcs`); a name may end in .gz or .zst besides.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from etils import epath

from rpo_jax.errors import UserError, say_install
from rpo_jax.writing import in_bucket

COMPRESSED = (".gz", ".zst")
MOST_BYTES = 16 * 2**20  # of one document: tokenising it takes some fifty times that
_BOM = b"\xef\xbb\xbf"
_BLOCK = 2**20


@dataclass(frozen=True)
class Span:
    """A piece of a file that can be read by itself.

    Attributes:
        path: of the file.
        start: byte (of lines) or row group (of Parquet) that it begins with.
        end: the first one after it; None: to the end of the file.
        first: number of its first line or row in the file, from 1.
        size: bytes on the disk.
    """

    path: str
    start: int = 0
    end: int | None = None
    first: int = 1
    size: int = 0


def plain_name(path: epath.PathLike) -> str:
    """The name of a file without the ending that tells of its compression."""
    name = os.path.basename(os.fspath(path))
    return name.removesuffix(".gz").removesuffix(".zst")


def find_files(
    patterns: Sequence[str], suffixes: tuple[str, ...], field: str
) -> tuple[epath.Path, ...]:
    """The files that globs match, each once: patterns in order, names sorted within each.

    Args:
        patterns: paths or globs (`**` for all sub-folders); `~` is understood.
        suffixes: endings that a file may have, beside the same with .gz or .zst.
        field: of the config, for the complaint.

    Raises:
        UserError: a pattern matches nothing, or a file with another ending.
    """
    found: dict[str, epath.Path] = {}
    for pattern in patterns:
        files = [path for path in map(epath.Path, _match(pattern)) if path.is_file()]
        if not files:
            raise UserError(f"{field}: no file matches {pattern!r}")
        for file in files:
            if not plain_name(file).endswith(suffixes):
                raise UserError(
                    f"{field}: {file}: cannot be read; {' or '.join(suffixes)} (or with "
                    f"{' or '.join(COMPRESSED)}) is wanted"
                )
            found[os.fspath(file)] = file
    return tuple(found.values())


def _match(pattern: str) -> list[str]:
    if not in_bucket(pattern):
        return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    try:
        from gcsfs import GCSFileSystem
    except ImportError as error:
        raise UserError(f"{pattern}: gs:// needs gcsfs: {say_install('gcs')}") from error
    if not glob.has_magic(pattern):
        return [pattern]
    return sorted(f"gs://{name}" for name in GCSFileSystem().glob(pattern))  # epath knows no `**`


def read_objects(span: Span | epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a JSONL file or of a piece of one; empty lines are skipped.

    Yields:
        (`file:line`, object)

    Raises:
        UserError: a line is not a JSON object in UTF-8, or the file is damaged.
    """
    span = span if isinstance(span, Span) else Span(os.fspath(span))
    for number, line in _read_lines(span):
        where = f"{span.path}:{number}"
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


def _read_lines(span: Span) -> Iterator[tuple[int, bytes]]:
    number, place = span.first, span.start
    with _naming(span.path), _open(span.path) as file:
        if span.start:
            file.seek(span.start)
        while span.end is None or place < span.end:
            line = file.readline(MOST_BYTES + 1)
            if not line:
                return
            if len(line) > MOST_BYTES:
                raise too_large(f"{span.path}:{number}")
            yield number, line
            number, place = number + 1, place + len(line)


def read_rows(span: Span, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file or of a piece of one, those columns of them that it has.

    Yields:
        (`file: row n`, values by column)

    Raises:
        UserError: the file is damaged, or none of the columns is there.
    """
    parquet = _arrow("pyarrow.parquet")
    with _naming(span.path), _open_raw(span.path) as file:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        wanted = [name for name in columns if name in names]
        if not wanted:
            raise UserError(
                f"{span.path}: no column {' or '.join(map(repr, columns))}; it has "
                f"{', '.join(names)}"
            )
        end = table.num_row_groups if span.end is None else span.end
        number = span.first
        batches = table.iter_batches(
            batch_size=256, row_groups=list(range(span.start, end)), columns=wanted
        )
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{span.path}: row {number}", row
                number += 1


def read_whole(path: epath.PathLike) -> str:
    """The text of a UTF-8 file, compressed or not.

    Raises:
        UserError: it is not UTF-8, damaged, or too large for one document.
    """
    with _naming(path), _open(path) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise too_large(os.fspath(path))
    return _decode(os.fspath(path), content.removeprefix(_BOM))


def too_large(where: str) -> UserError:
    """The complaint about a document that is more than one."""
    return UserError(
        f"{where}: a document of more than {MOST_BYTES // 2**20} MiB; cut it into documents first"
    )


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


def digest_files(paths: Iterable[epath.PathLike]) -> list[dict[str, Any]]:
    """Where each file lies, its size in bytes and its sha256."""
    return [survey_file(path)[0] for path in paths]


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of files of a folder, by name; `check_sums` compares them."""
    return {name: survey_file(folder / name)[0]["sha256"] for name in names}


def check_sums(folder: Path, note: str) -> None:
    """Checks that the files of a finished folder are still those that were written there.

    Args:
        folder: holds them and `note`.
        note: JSON whose ``sha256`` is what `sum_files` gave.

    Raises:
        UserError: one is missing or another.
    """
    remedy = f"delete {folder}, and the same command makes it anew"
    try:
        sums = json.loads((folder / note).read_text(encoding="utf-8"))["sha256"]
        found = sum_files(folder, sums)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged ({error}); {remedy}") from error
    for name in sums:
        if found[name] != sums[name]:
            raise UserError(f"{folder / name}: not what was written there; {remedy}")


def survey_file(path: epath.PathLike, span_bytes: int = 0) -> tuple[dict[str, Any], list[Span]]:
    """Reads a file through once: what it is, and pieces of it that can be read by themselves.

    Args:
        path: of the file.
        span_bytes: least bytes of a piece, but for the last one; 0: the file stays whole, as it
            does where it is compressed or a plain text.

    Returns:
        Path, bytes and sha256; the pieces, in order.
    """
    name = os.fspath(path)
    sha256, size, lines = hashlib.sha256(), 0, 0
    cut = span_bytes if span_bytes and name.endswith(".jsonl") else 0
    starts, due = [(0, 1)], cut
    with _naming(path), _open_raw(path) as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            if cut:
                place = 0
                # A piece begins after the first end of line from `due` on.
                while due < size + len(block) and (
                    end := block.find(b"\n", max(due - size, place)) + 1
                ):
                    lines += block.count(b"\n", place, end)
                    starts.append((size + end, lines + 1))
                    place, due = end, size + end + cut
                lines += block.count(b"\n", place)
            size += len(block)
        if span_bytes and name.endswith(".parquet"):
            starts, ends = _cut_groups(file, span_bytes)
        else:
            starts = [start for start in starts if start[0] < size] or [(0, 1)]
            ends = [start for start, _ in starts[1:]] + [None]
    spans = [
        Span(name, start, end, first, size // len(starts))
        for (start, first), end in zip(starts, ends, strict=True)
    ]
    return {"path": name, "bytes": size, "sha256": sha256.hexdigest()}, spans


def _cut_groups(file: Any, span_bytes: int) -> tuple[list[tuple[int, int]], list[int | None]]:
    """Row groups of a Parquet file together until they are large enough."""
    file.seek(0)
    meta = _arrow("pyarrow.parquet").ParquetFile(file).metadata
    starts, held, rows = [(0, 1)], 0, 0
    for group in range(meta.num_row_groups):
        if held >= span_bytes:
            starts.append((group, rows + 1))
            held = 0
        held += meta.row_group(group).total_byte_size
        rows += meta.row_group(group).num_rows
    return starts, [*(start for start, _ in starts[1:]), None]


def _open_raw(path: epath.PathLike) -> Any:
    file = epath.Path(path).open("rb")
    # Files of a bucket know no `readline` up to a length.
    return io.BufferedReader(file, _BLOCK) if in_bucket(path) else file


@contextlib.contextmanager
def _open(path: epath.PathLike) -> Iterator[Any]:
    name = os.fspath(path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_raw(path))
        if name.endswith(".gz"):
            file = stack.enter_context(gzip.open(file, "rb"))
        elif name.endswith(".zst"):
            stream = _arrow("pyarrow").CompressedInputStream(file, "zstd")
            file = stack.enter_context(io.BufferedReader(stream, _BLOCK))
        yield file


def _arrow(name: str) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Parquet and .zst files need pyarrow: {say_install('corpus')}") from error
    module = pyarrow.parquet if name == "pyarrow.parquet" else pyarrow
    assert isinstance(module, ModuleType)
    return module


@contextlib.contextmanager
def _naming(path: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, zlib.error) as error:  # gzip's complaints do not name the file
        raise UserError(f"{os.fspath(path)}: cannot be read ({error})") from error
    except ValueError as error:
        if type(error).__module__ != "pyarrow.lib":
            raise
        raise UserError(f"{os.fspath(path)}: cannot be read ({error})") from error


def _decode(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}: {error.reason})") from error


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
