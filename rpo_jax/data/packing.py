"""Rows filled without waste: documents are cut where a row ends, pairs are kept whole."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


def pack(
    documents: Iterable[Int[np.ndarray, "..."]], row_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Cuts the stream of all documents into rows without a gap; only the last row is padded.

    A document that crosses a row's end goes on in the next row as a segment of its own.

    Args:
        documents: token ids, each document ending in its end-of-text id; empty ones are skipped.
        row_length: T, tokens.

    Yields:
        tokens and segment_ids, int32 [T]: segments count from 1 in every row, 0 is padding.
    """
    tokens = np.zeros(row_length, np.int32)
    segment_ids = np.zeros(row_length, np.int32)
    filled, segment = 0, 0
    for document in documents:
        start = 0
        while start < len(document):
            piece = document[start : start + row_length - filled]
            segment += 1
            tokens[filled : filled + len(piece)] = piece
            segment_ids[filled : filled + len(piece)] = segment
            start += len(piece)
            filled += len(piece)
            if filled == row_length:
                yield {"tokens": tokens, "segment_ids": segment_ids}
                tokens, segment_ids = np.zeros_like(tokens), np.zeros_like(segment_ids)
                filled, segment = 0, 0
    if filled:
        yield {"tokens": tokens, "segment_ids": segment_ids}


def positions_from_segments(segment_ids: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
    """Positions that restart at 0 with every segment (and with the padding), int32 [T]."""
    index = np.arange(len(segment_ids), dtype=np.int32)
    is_start = np.ones(len(segment_ids), bool)
    is_start[1:] = segment_ids[1:] != segment_ids[:-1]
    return index - np.maximum.accumulate(np.where(is_start, index, 0))


@dataclass(frozen=True)
class Size:
    """Of a pair, or of a row."""

    tokens: int
    targets: int

    def __add__(self, other: "Size") -> "Size":
        """Of both together."""
        return Size(self.tokens + other.tokens, self.targets + other.targets)

    def fits(self, room: "Size") -> bool:
        """Whether it has its place in there."""
        return self.tokens <= room.tokens and self.targets <= room.targets

    def fractions(self, count: int) -> "tuple[Size, ...]":
        """1/count of it, 2/count, ... all of it, rounded up."""
        return tuple(
            Size(-(-self.tokens * k // count), -(-self.targets * k // count))
            for k in range(1, count + 1)
        )


def plan_rows(sizes: Sequence[Size], row_size: Size, most: int) -> list[list[int]]:
    """Which pairs share a row: the longest first, each into the first row that has room for it.

    Args:
        sizes: of the pairs; each fits into a row.
        row_size: of a row.
        most: pairs in a row.

    Returns:
        The places of the pairs of each row, the fullest row first; at most as many rows as pairs.
    """
    rows: list[list[int]] = []
    used: list[Size] = []
    for pair in sorted(range(len(sizes)), key=lambda i: -sizes[i].tokens):
        for row, full in enumerate(used):
            if len(rows[row]) < most and (full + sizes[pair]).fits(row_size):
                break
        else:
            row = len(rows)
            rows.append([])
            used.append(Size(0, 0))
        rows[row].append(pair)
        used[row] += sizes[pair]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: -used[i].tokens)]


def deal_rows(rows: Sequence[list[int]], count: int, parts: int) -> list[list[int]]:
    """Rows to the places of a batch, so that rows next to each other come into one part of it.

    Args:
        rows: at most `count`; places left over stay empty.
        count: rows of the batch.
        parts: the micro-batches; part i has every parts-th row from i on.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    for i, row in enumerate(rows):
        part, place = divmod(i, count // parts)
        dealt[place * parts + part] = row
    return dealt
