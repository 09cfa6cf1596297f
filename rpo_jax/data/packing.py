"""Documents to rows of one length: concatenate, then cut."""

from collections.abc import Iterable, Iterator

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
