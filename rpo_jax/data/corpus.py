"""Documents: read, normalised, tokenised, one after the other."""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from rpo_jax.data.files import read_objects, read_whole, take_string
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Document:
    """One text, in Unicode NFC."""

    id: str
    text: str


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """The documents of files: a line of .jsonl (`text`, and `id` if it has one), or a whole .txt.

    Raises:
        UserError: with file and line, where something is not as it should be.
    """
    for path in paths:
        if path.name.removesuffix(".gz").endswith(".txt"):
            yield Document(path.name, unicodedata.normalize("NFC", read_whole(path)))
            continue
        for number, (where, record) in enumerate(read_objects(path), start=1):
            text = unicodedata.normalize("NFC", take_string(where, record, "text"))
            document_id = take_string(where, record, "id") if "id" in record else ""
            yield Document(document_id or f"{path.name}#{number}", text)


def tokenise_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, ledger: Ledger
) -> Iterator[Int[np.ndarray, "..."]]:
    """Token ids, int32, of every document that is not empty; each ends in the end-of-text id.

    Args:
        documents: read as a stream.
        tokenizer: takes text as plain text: a literal end-of-text token in it ends nothing.
        ledger: learns the documents, characters and tokens (end of text included), and the drops.
    """
    for document in documents:
        if not document.text.strip():
            ledger.drop("empty", document.id)
            continue
        ids = np.array([*tokenizer.encode(document.text), tokenizer.eos_id], np.int32)
        ledger.keep(tokens=len(ids), characters=len(document.text))
        yield ids
