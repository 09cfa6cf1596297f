"""Which documents stay, how often, and in which order: of all documents, by what their texts are.

A document's *rank* is 0 where it is kept whatever happens (given held-out files), else 1. Of copies
the one of the lowest rank stays, then the first in the input; of near copies the one of the lowest
rank, then of the smallest hash. Nothing depends on who read what when.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8, UInt32, UInt64

from rpo_jax.data.overlap import likeness, mix

_PASS = 0xD1B54A32D192ED03  # tells the passes of a document apart


@dataclass(frozen=True)
class Texts:
    """What is known of N documents.

    Attributes:
        rank: see above.
        high: hash of the text, first half.
        low: second half.
        part: that read it.
        place: in the part.
    """

    rank: UInt8[np.ndarray, "N"]
    high: UInt64[np.ndarray, "N"]
    low: UInt64[np.ndarray, "N"]
    part: UInt32[np.ndarray, "N"]
    place: UInt32[np.ndarray, "N"]


def find_copies(texts: Texts) -> Int[np.ndarray, "N"]:
    """For each document the one that is kept in its place: itself, or the first with its text."""
    order = np.lexsort((texts.place, texts.part, texts.rank, texts.low, texts.high))
    high, low = texts.high[order], texts.low[order]
    begins = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1]))[: len(order)]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    keeper = np.empty(len(order), np.int64)
    keeper[order] = order[first]
    return np.where(texts.rank == 0, np.arange(len(order)), keeper)


def find_near_copies(
    texts: Texts, signatures: UInt32[np.ndarray, "N K"], least: float
) -> Int[np.ndarray, "N"]:
    """The same among documents that share a band key: itself, or one that it is like.

    Args:
        texts: of one group, all different.
        signatures: of each.
        least: likeness from which on two are near copies.
    """
    keeper = np.arange(len(signatures))
    leaders: list[int] = []
    for member in np.lexsort((texts.low, texts.high, texts.rank)):
        alike = likeness(signatures[leaders], signatures[member]) >= least
        if texts.rank[member] and alike.any():
            keeper[member] = leaders[int(np.argmax(alike))]
        else:
            leaders.append(int(member))
    return keeper


def find_groups(keys: UInt64[np.ndarray, "N"]) -> list[Int[np.ndarray, "..."]]:
    """The places of keys that occur more than once, together."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    cuts = np.flatnonzero(np.append(True, sorted_keys[1:] != sorted_keys[:-1])[: len(keys)])
    sizes = np.diff(cuts, append=len(keys))
    return [order[cut : cut + size] for cut, size in zip(cuts, sizes, strict=True) if size > 1]


def find_passes(
    characters: Sequence[int], epochs: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """How often each source is passed over.

    Args:
        characters: of each source, copies left out.
        epochs: of each; with weights, the most.
        weights: what shares of the whole they shall be, or none.
    """
    if not weights:
        return list(epochs)
    wanted = [weight / max(size, 1) for weight, size in zip(weights, characters, strict=True)]
    scale = min(most / want for most, want in zip(epochs, wanted, strict=True) if want)
    return [scale * want for want in wanted]


def count_passes(
    low: UInt64[np.ndarray, "N"], passes: UInt64[np.ndarray, "N"] | np.ndarray
) -> Int[np.ndarray, "N"]:
    """How often each document comes: its source's passes, the fraction decided by its hash."""
    whole = np.floor(passes)
    chance = mix(low ^ np.uint64(_PASS)).astype(np.float64) / 2.0**64
    return (whole + (chance < passes - whole)).astype(np.int64)


def order_keys(
    high: UInt64[np.ndarray, "N"], number: Int[np.ndarray, "N"]
) -> UInt64[np.ndarray, "N"]:
    """What the passes of documents are sorted by, in their shard; `number` counts from 0."""
    return mix(high + number.astype(np.uint64) * np.uint64(_PASS))


def choose_shard(
    high: UInt64[np.ndarray, "N"], shards: Int[np.ndarray, "N"]
) -> Int[np.ndarray, "N"]:
    """The shard of each document, of so many."""
    return (high % shards.astype(np.uint64)).astype(np.int64)
