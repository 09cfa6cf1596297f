"""The first look at documents: all that can be decided about each of them alone."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rpo_jax.config import Corpus
from rpo_jax.data.cleaning import make_clean
from rpo_jax.data.corpus import Document, read_documents
from rpo_jax.data.files import Span
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.overlap import COPY_GRAM, Questions, mix, sign, take_ngrams

TRAIN, HELDOUT, GENERAL = "train", "heldout", "general"


@dataclass(frozen=True)
class Collection:
    """Files that belong together.

    Attributes:
        name: the pattern that found them.
        split: TRAIN (documents are filtered), or another (they are kept whole).
    """

    name: str
    split: str


@dataclass(frozen=True)
class Piece:
    """A span of a file of a source."""

    source: int
    span: Span


Part = Sequence[Piece]  # what one worker reads at a time


@dataclass(frozen=True)
class Found:
    """A document that passed.

    Attributes:
        source: number of its source.
        split: of the records it goes to.
        place: number of its part, and its own in that part: the order of the input.
        high: the first 8 bytes of the hash of its text.
        low: the next 8.
        id: of the document.
        text: in NFC, without boilerplate lines.
    """

    source: int
    split: str
    place: tuple[int, int]
    high: int
    low: int
    id: str
    text: str

    @property
    def key(self) -> str:
        """The hash of its text, in hexadecimal digits."""
        return f"{self.high:016x}{self.low:016x}"

    def sign(self) -> np.ndarray:
        """The MinHash signature of its text."""
        return sign(take_ngrams(self.text, COPY_GRAM))


@dataclass
class Contact:
    """What training text held of a question of the evaluation.

    Attributes:
        documents: left out for it.
        example: the first of them, or of those that came nearest.
        share: the largest share of the question's grams in a document.
    """

    documents: int = 0
    example: str = ""
    share: float = 0.0


@dataclass
class Account:
    """What became of documents.

    Attributes:
        ledgers: by split.
        contacts: by the id of a question.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    contacts: dict[str, Contact] = field(default_factory=dict)

    def of(self, split: str) -> Ledger:
        """The ledger of a split."""
        return self.ledgers.setdefault(split, Ledger("documents"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {
            "ledgers": {split: ledger.to_dict() for split, ledger in self.ledgers.items()},
            "contacts": {question: asdict(c) for question, c in self.contacts.items()},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Account":
        """The account that `to_dict` wrote."""
        return cls(
            {split: Ledger.from_dict(ledger) for split, ledger in stored["ledgers"].items()},
            {question: Contact(**contact) for question, contact in stored["contacts"].items()},
        )

    def touch(self, question: str, document: str, share: float, left_out: bool) -> None:
        """Notes that a document held a share of a question."""
        contact = self.contacts.setdefault(question, Contact())
        contact.documents += left_out
        if share > contact.share:
            contact.share, contact.example = share, document

    def add(self, other: "Account") -> None:
        """Takes over the account of documents that came after those of this one."""
        for split, ledger in other.ledgers.items():
            self.of(split).add(ledger)
        for question, more in other.contacts.items():
            mine = self.contacts.setdefault(question, Contact())
            mine.documents += more.documents
            if more.share > mine.share:
                mine.share, mine.example = more.share, more.example


def hash_text(text: str) -> tuple[int, int]:
    """128 bits of the BLAKE2 hash of a text, as two numbers."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def screen(
    part: Part,
    number: int,
    sources: Sequence[Collection],
    corpus: Corpus,
    questions: Questions | None,
    account: Account,
    meet: Callable[[str, Document], None],
) -> Iterator[Found]:
    """The documents of a part that pass every test that looks at one document alone.

    Args:
        part: pieces of files.
        number: of the part.
        sources: of all pieces.
        corpus: the filters.
        questions: that training text must not hold; None: it may.
        account: learns what was left out, and why.
        meet: is told of each document with an id of its own, left out or not, and of its split in
            the input.
    """
    clean = make_clean(corpus)
    counter = 0
    for piece in part:
        source = sources[piece.source]
        kept_whole = source.split != TRAIN
        for document in read_documents(piece.span, corpus.text_field, corpus.id_field):
            if document.named:
                meet(source.split, document)
            text, reason = document.text, ""
            if kept_whole:
                reason = "" if text.strip() else "empty"
            else:
                text, reason = clean(text)
            high, low = hash_text(text)
            split = HELDOUT if not kept_whole and _is_drawn(low, corpus) else source.split
            ledger = account.of(split)
            if reason:
                empty = reason == "empty"
                ledger.drop(reason, document.where, 0 if empty else len(text), asked=not empty)
                continue
            if questions is not None and not kept_whole:
                shares = questions.find(text)
                for question, share in shares.items():
                    account.touch(question, document.where, share, share > corpus.max_overlap)
                worst = max(shares, key=shares.__getitem__, default="")
                if shares and shares[worst] > corpus.max_overlap:
                    example = f"{document.where} ({worst})"
                    ledger.drop("holds a question of the evaluation", example, asked=True)
                    continue
            yield Found(piece.source, split, (number, counter), high, low, document.id, text)
            counter += 1


def _is_drawn(low: int, corpus: Corpus) -> bool:
    """Whether a document that could be trained on is held out."""
    return int(mix(np.array([low], np.uint64))[0]) < corpus.heldout_share * 2.0**64
