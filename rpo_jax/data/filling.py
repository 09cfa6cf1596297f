"""From chosen documents to the record file of a shard."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from rpo_jax.config import Data
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.packing import pack
from rpo_jax.data.records import text_features, write_shard
from rpo_jax.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 18  # tokenised at a time
SAMPLES = 2  # texts a shard that a data card may show
_SAMPLE_CHARACTERS = 300


@dataclass(frozen=True)
class Chosen:
    """A document on its way into a shard."""

    source: int
    id: str
    text: str


@dataclass
class Shard:
    """What a record file holds.

    Attributes:
        records: rows.
        ledger: of its documents, each pass over one counted.
        sources: documents, characters and tokens by number of the source.
        samples: the beginnings of the first documents.
    """

    records: int
    ledger: Ledger
    sources: dict[int, dict[str, int]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"ledger": self.ledger.to_dict()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Shard":
        """The account that `to_dict` wrote."""
        sources = {int(number): totals for number, totals in stored["sources"].items()}
        ledger = Ledger.from_dict(stored["ledger"])
        return cls(stored["records"], ledger, sources, stored["samples"])


def fill_shard(
    path: epath.PathLike, documents: Iterable[Chosen], tokenizer: Tokenizer, data: Data
) -> Shard:
    """Tokenises and packs documents in the order given, and writes them as one record file.

    Every document ends in the end-of-text id, however it is cut into rows.
    """
    shard = Shard(0, Ledger("documents"))
    longest = data.row_length if data.corpus.long_documents == "drop" else 0
    rows = pack(
        _tokenise(documents, tokenizer, longest, shard),
        data.row_length,
        best_fit=data.corpus.long_documents != "continue",
    )
    shard.records = write_shard(path, text_features(data.row_length), rows)
    return shard


def _tokenise(
    documents: Iterable[Chosen], tokenizer: Tokenizer, longest: int, shard: Shard
) -> Iterator[tuple[str, np.ndarray]]:
    for batch in _batches(documents):
        many = tokenizer.encode_many([document.text for document in batch])
        for document, ids in zip(batch, many, strict=True):
            if len(shard.samples) < SAMPLES:
                sample = document.text[:_SAMPLE_CHARACTERS]
                shard.samples.append({"id": document.id, "text": sample})
            if 0 < longest <= len(ids):
                reason = f"longer than data.row_length={longest} tokens"
                shard.ledger.drop(reason, document.id, len(ids) + 1)
                continue
            amounts = {"tokens": len(ids) + 1, "characters": len(document.text)}
            shard.ledger.keep(**amounts)
            totals = shard.sources.setdefault(
                document.source, {"documents": 0, **dict.fromkeys(amounts, 0)}
            )
            for name, amount in {"documents": 1, **amounts}.items():
                totals[name] += amount
            yield document.id, np.array([*ids, tokenizer.eos_id], np.int32)


def _batches(documents: Iterable[Chosen]) -> Iterator[list[Chosen]]:
    batch: list[Chosen] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
