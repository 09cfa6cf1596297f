"""Rows filled without waste: documents one after the other or as they fit, pairs kept whole."""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int


def pack(
    documents: Iterable[tuple[str, Int[np.ndarray, "..."]]], row_length: int, best_fit: bool = False
) -> Iterator[dict[str, Any]]:
    """Puts documents into rows of one length; what is left of a row is padding.

    As they come, documents follow each other without a gap: one that crosses a row's end goes on in
    the next row as a segment of its own, and only the last row is padded. With `best_fit`, only
    what is longer than a row is cut, and pieces go where they leave the least room; that wants to
    see all documents first.

    Args:
        documents: name and token ids, each ending in its end-of-text id; empty ones are skipped.
        row_length: T, tokens.
        best_fit: see above.

    Yields:
        tokens and segment_ids, int32 [T]: segments count from 1 in every row, 0 is padding; and
        documents, the name of each segment on a line.

    Source: best fit, Ding et al. (arXiv:2404.10830).
    """
    pieces = _cut_to_rows(documents, row_length, even=best_fit)
    rows = _fit(list(pieces), row_length) if best_fit else _follow(pieces, row_length)
    for row in rows:
        tokens, segment_ids = np.zeros(row_length, np.int32), np.zeros(row_length, np.int32)
        filled = 0
        for segment, (_, piece) in enumerate(row, start=1):
            tokens[filled : filled + len(piece)] = piece
            segment_ids[filled : filled + len(piece)] = segment
            filled += len(piece)
        names = "\n".join(name for name, _ in row)
        yield {"tokens": tokens, "segment_ids": segment_ids, "documents": names}


def _cut_to_rows(
    documents: Iterable[tuple[str, np.ndarray]], row_length: int, even: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Pieces of at most a row: from each document's start, or where rows end that follow on."""
    filled = 0
    for name, ids in documents:
        start = 0
        while start < len(ids):
            piece = ids[start : start + row_length - (0 if even else filled)]
            yield name, piece
            start += len(piece)
            filled = (filled + len(piece)) % row_length


def _follow(
    pieces: Iterable[tuple[str, np.ndarray]], row_length: int
) -> Iterator[list[tuple[str, np.ndarray]]]:
    row: list[tuple[str, np.ndarray]] = []
    filled = 0
    for piece in pieces:
        row.append(piece)
        filled += len(piece[1])
        if filled == row_length:
            yield row
            row, filled = [], 0
    if row:
        yield row


def _fit(
    pieces: list[tuple[str, np.ndarray]], row_length: int
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Longest first, each into the row with the least room that it fits in."""
    rows: list[list[int]] = []
    spaces: list[int] = []  # that some row has left, sorted
    open_rows: dict[int, list[int]] = {}  # by their space
    for piece in sorted(range(len(pieces)), key=lambda i: -len(pieces[i][1])):
        size = len(pieces[piece][1])
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            row, space = len(rows), row_length
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(piece)
        if left := space - size:
            if left not in open_rows:
                bisect.insort(spaces, left)
            open_rows.setdefault(left, []).append(row)
    # In the order of the first document of each row, so that like lengths do not come together.
    for row_pieces in sorted(map(sorted, rows)):
        yield [pieces[i] for i in row_pieces]


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
