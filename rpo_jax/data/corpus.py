"""Documents: read from files of several kinds, normalised."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from rpo_jax.data.files import (
    MOST_BYTES,
    Span,
    plain_name,
    read_objects,
    read_rows,
    read_whole,
    take_string,
    too_large,
)

SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text, in Unicode NFC.

    Attributes:
        id: its own, or file and line.
        text: of it.
        where: file and line, for messages.
        named: whether the id is its own.
    """

    id: str
    text: str
    where: str
    named: bool = False


def read_documents(
    span: Span, text_field: str = "text", id_field: str = "id"
) -> Iterator[Document]:
    """The documents of a file or a piece of one: a line, a row of Parquet, or a whole .txt.

    Args:
        span: what to read.
        text_field: field of a JSON object, or column, that holds the text.
        id_field: the same of the id; a document may do without.

    Raises:
        UserError: with file and line, where something is not as it should be.
    """
    name = PurePosixPath(span.path).name
    if plain_name(name).endswith(".txt"):
        yield Document(name, _normalise(read_whole(span.path)), span.path)
        return
    if name.endswith(".parquet"):
        records = read_rows(span, (text_field, id_field))
    else:
        records = read_objects(span)
    for where, record in records:
        text = take_string(where, record, text_field)
        if len(text) > MOST_BYTES // 4 and len(text.encode()) > MOST_BYTES:
            raise too_large(where)
        own = take_string(where, record, id_field) if record.get(id_field) is not None else ""
        number = where.removeprefix(span.path).lstrip(": row")
        yield Document(own or f"{name}#{number}", _normalise(text), where, bool(own))


def _normalise(text: str) -> str:
    return unicodedata.normalize("NFC", text)
