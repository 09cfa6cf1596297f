"""All that text records follow from, and the steps that follow, as functions of it.

    read and screen a part     each document alone: filters, questions of the evaluation
    choose                     of all documents: copies, passes, the order in their shard
    fill a shard               tokens, rows, one record file

A *part* is a piece of the input, a *shard* a piece of the output; both follow from the input alone.
Who runs them (`rpo_jax.data.local`, `rpo_jax.data.beam`) and on how many machines makes no
difference to a byte of what comes out.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from rpo_jax.config import Data
from rpo_jax.data.copies import count_passes, find_passes, order_keys
from rpo_jax.data.corpus import Document
from rpo_jax.data.files import survey_file
from rpo_jax.data.filling import Shard
from rpo_jax.data.ledger import NOT_DRAWN, Drop, Ledger, check_shares
from rpo_jax.data.overlap import Questions
from rpo_jax.data.records import FORMAT, digest
from rpo_jax.data.screening import TRAIN, Account, Collection, Found, Part, Piece, screen
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError

_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What is made of what.

    Attributes:
        data: the settings.
        tokenizer: of the records.
        questions: that training text must not hold; None: it may.
        sources: of the files.
        files: path, bytes and sha256 of each, by source.
        parts: of the input, in order.
    """

    data: Data
    tokenizer: Tokenizer
    questions: Questions | None
    sources: tuple[Collection, ...]
    files: tuple[tuple[Mapping[str, Any], ...], ...]
    parts: tuple[Part, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """The record sets, the one trained on first."""
        named = [TRAIN, *(source.split for source in self.sources)]
        return tuple(dict.fromkeys(named + ["heldout"] * (self.data.corpus.heldout_share > 0)))

    def count_shards(self, split: str) -> int:
        """Record files of a split: one for so many bytes of its input."""
        share = self.data.corpus.heldout_share
        drawn = {TRAIN: 1 - share, "heldout": share}
        size = 0.0
        for source, files in zip(self.sources, self.files, strict=True):
            part = drawn.get(split, 0.0) if source.split == TRAIN else source.split == split
            size += part * sum(file["bytes"] for file in files)
        return max(1, round(size / (self.data.corpus.shard_mib * _MIB)))

    @property
    def settings(self) -> dict[str, Any]:
        """What the records depend on besides the content of the files."""
        corpus = dataclasses.asdict(self.data.corpus)
        del corpus["exams"], corpus["max_filtered_share"]  # the questions; when to stop
        return {
            "format": FORMAT,
            "splits": [source.split for source in self.sources],
            "corpus": corpus,
            "row_length": self.data.row_length,
            "tokenizer": self.tokenizer.fingerprint,
            "questions": self.questions.fingerprint if self.questions else "",
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all that the records depend on."""
        files = [[[_name(f), f["sha256"]] for f in files] for files in self.files]
        return digest({"settings": self.settings, "files": files})

    @functools.cached_property
    def part_keys(self) -> tuple[str, ...]:
        """Of all that each screened part depends on, but for the settings."""
        files = {f["path"]: [_name(f), f["sha256"]] for files in self.files for f in files}
        return tuple(
            digest([[p.source, *files[p.span.path], p.span.start, p.span.end] for p in part])
            for part in self.parts
        )

    @property
    def ranks(self) -> np.ndarray:
        """Of each source: see `rpo_jax.data.copies`."""
        return np.array([source.split == TRAIN for source in self.sources], np.uint8)


def make_plan(
    data: Data,
    tokenizer: Tokenizer,
    questions: Questions | None,
    sources: Mapping[Collection, Sequence[epath.PathLike]],
) -> Plan:
    """Reads all files through once, to know them and to cut them into parts.

    Raises:
        UserError: a file cannot be read.
    """
    limit = data.corpus.shard_mib * _MIB
    parts: list[Part] = []
    files: list[tuple[Mapping[str, Any], ...]] = []
    open_part: list[Piece] = []
    for number, paths in enumerate(sources.values()):
        surveys = [survey_file(path, limit) for path in paths]
        files.append(tuple(file for file, _ in surveys))
        for span in (span for _, spans in surveys for span in spans):
            open_part.append(Piece(number, span))
            if sum(piece.span.size for piece in open_part) >= limit:
                parts.append(tuple(open_part))
                open_part = []
    if open_part:
        parts.append(tuple(open_part))
    return Plan(data, tokenizer, questions, tuple(sources), tuple(files), tuple(parts))


def screen_part(
    plan: Plan, number: int, account: Account, meet: Callable[[str, Document], None]
) -> Iterator[Found]:
    """The first step, for one part."""
    part, corpus = plan.parts[number], plan.data.corpus
    return screen(part, number, plan.sources, corpus, plan.questions, account, meet)


def choose_passes(plan: Plan, characters: Mapping[int, int]) -> list[float]:
    """How often each source is passed over.

    Args:
        plan: names the sources.
        characters: of each, copies left out.
    """
    corpus = plan.data.corpus
    trained = [i for i, source in enumerate(plan.sources) if source.split == TRAIN]
    passes = find_passes(
        [characters.get(i, 0) for i in trained],
        corpus.epochs or [1.0] * len(trained),
        corpus.weights,
    )
    found = dict(zip(trained, passes, strict=True))
    return [found.get(i, 1.0) for i in range(len(plan.sources))]


def spread_passes(
    high: np.ndarray, low: np.ndarray, passes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Documents once for each pass over them.

    Args:
        high: of N documents.
        low: of the same.
        passes: over the source of each.

    Returns:
        The document of each pass, by its number of N; what the passes are sorted by.
    """
    counts = count_passes(low, passes)
    which = np.repeat(np.arange(len(high)), counts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return which, order_keys(high[which], number)


def drop_reasons(plan: Plan) -> dict[str, str]:
    """How the ledger calls what the second step leaves out."""
    return {
        "copy": "the same text as another document",
        "near": f"like another document (data.corpus.near_copies={plan.data.corpus.near_copies:g})",
        "passes": NOT_DRAWN,
    }


def leave_out(
    plan: Plan, account: Account, split: str, reason: str, count: int, left: str, stays: str
) -> None:
    """Notes what the second step leaves out.

    Args:
        plan: that asks for it.
        account: that learns it.
        split: of the documents.
        reason: of `drop_reasons`.
        count: of the documents.
        left: the first of them.
        stays: what is kept in its place, if anything.
    """
    drop = Drop(count, f"{left} (like {stays})" if stays else left, asked=True)
    account.of(split).add(Ledger("documents", 0, {drop_reasons(plan)[reason]: drop}))


def describe_set(
    plan: Plan, split: str, account: Account, shards: Sequence[Shard], passes: Sequence[float]
) -> dict[str, Any]:
    """What `dataset.json` says of a record set.

    Raises:
        UserError: more than allowed was left out, or nothing is left.
    """
    ledger = Ledger("documents")
    ledger.add(account.of(split))
    sources: dict[int, dict[str, int]] = {}
    for shard in shards:
        ledger.add(shard.ledger)
        for number, totals in shard.sources.items():
            mine = sources.setdefault(number, dict.fromkeys(totals, 0))
            for name, amount in totals.items():
                mine[name] += amount
    check_shares(ledger, split, plan.data)
    if not ledger.kept:
        names = ", ".join(source.name for source in plan.sources if source.split in (split, TRAIN))
        raise UserError(f"{split}: there are no documents in {names}\n{ledger}")
    samples = [sample for shard in shards for sample in shard.samples]
    questions = plan.questions if split == TRAIN else None
    return {
        "kind": "rows",
        "fingerprint": digest({"plan": plan.fingerprint, "split": split}),
        "row_tokens": plan.data.row_length,
        "ledger": ledger.to_dict(),
        "sources": [
            {"name": plan.sources[number].name, "passes": passes[number], **sources[number]}
            for number in sorted(sources)
        ],
        "questions": None if questions is None else _tell_contacts(questions, account),
        "samples": samples[:5],
        "provenance": {
            **plan.settings,
            "files": [file for files in plan.files for file in files],
            "split": split,
        },
    }


def _tell_contacts(questions: Questions, account: Account) -> dict[str, Any]:
    contacts = {name: dataclasses.asdict(found) for name, found in sorted(account.contacts.items())}
    return {
        "checked": len(questions),
        "too_short": list(questions.unchecked),
        "contacts": contacts,
    }


def _name(file: Mapping[str, Any]) -> str:
    return epath.Path(file["path"]).name
