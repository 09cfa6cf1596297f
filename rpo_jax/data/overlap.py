"""Texts that are alike: n-grams, what of a question a text holds, MinHash signatures.

Texts are compared by their letters and digits alone, case, width, accents and voicing marks folded
away: what a page's layout or a keyboard changes makes no difference. All of it is arithmetic on the
text: the same on every machine.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt32, UInt64

QUESTION_GRAM = 13  # letters; longer than most phrases that all questions of an exam share
COPY_GRAM = 5
BINS = 128  # of a signature
_BANDS, _BAND_BINS = 21, 6  # found together: 99.8 % of pairs at likeness 0.8, 28 % at 0.5

# What choices are listed by, which each page does in its own way.
_LABELS = re.compile(r"^\s*[A-Ea-eＡ-Ｅａ-ｅ1-5１-５①-⑤ア-オ][\s.．:：、,)）]", re.MULTILINE)
_MULTIPLIER = 0x9E3779B97F4A7C15
_FILTER_BITS = 22


@functools.lru_cache(maxsize=1)  # every test of a document begins with this
def fold(text: str) -> UInt32[np.ndarray, "C"]:
    """The code points of the letters and digits of `text`, folded; read-only."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    table = _fold_table()
    if codes.size and codes.max() >= len(table):
        codes = np.where(codes < len(table), table[np.minimum(codes, len(table) - 1)], codes)
    else:
        codes = table[codes]
    codes = codes[codes > 0]
    codes.flags.writeable = False
    return codes


def hash_ngrams(codes: UInt32[np.ndarray, "C"], n: int) -> UInt64[np.ndarray, "W"]:
    """A hash of each run of `n` code points, in order; none where there are fewer than `n`."""
    if len(codes) < n:
        return np.zeros(0, np.uint64)
    # The hash of v + w codes is that of the first v times m^w plus that of the others; w doubles.
    window, width, power = codes.astype(np.uint64), 1, _MULTIPLIER
    hashes, done = window[:0], 0
    while True:
        if n & width:
            more = window[done:]
            hashes = hashes[: len(more)] * np.uint64(power) + more if done else more
            done += width
        if done == n:
            return mix(hashes)
        window = window[:-width] * np.uint64(power) + window[width:]
        width, power = 2 * width, power * power % 2**64


def mix(hashes: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Spreads 64 bits over all 64 bits, one to one. Source: splitmix64 (Steele et al., 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def take_ngrams(text: str, n: int) -> UInt64[np.ndarray, "G"]:
    """The set of the n-grams of `text`, as sorted hashes; a shorter text is one gram."""
    codes = fold(text)
    return _distinct(hash_ngrams(codes, min(n, max(len(codes), 1))))


def jaccard(left: UInt64[np.ndarray, "G"], right: UInt64[np.ndarray, "H"]) -> float:
    """What two sets of n-grams share, over what either has; 0 for two empty ones."""
    both = len(np.intersect1d(left, right, assume_unique=True))
    return both / max(len(left) + len(right) - both, 1)


@dataclass(frozen=True)
class Questions:
    """An index of texts that are to be recognised in others; `index_questions` makes one.

    Attributes:
        n: letters of a gram.
        unchecked: ids without a text of `n` letters: they are never found.
    """

    n: int
    unchecked: tuple[str, ...]
    _ids: tuple[str, ...] = field(repr=False)  # of each passage
    _sizes: np.ndarray = field(repr=False)  # grams of each passage
    _grams: np.ndarray = field(repr=False)  # sorted, each once
    _starts: np.ndarray = field(repr=False)  # where the owners of each begin, and the end
    _owners: np.ndarray = field(repr=False)  # the passages that have it, gram by gram
    _filter: np.ndarray = field(repr=False)  # bool by the highest bits of a gram

    @property
    def fingerprint(self) -> str:
        """Of all that it finds."""
        content = hashlib.sha256(repr((self.n, self._ids)).encode())
        every = np.repeat(self._grams, np.diff(self._starts))
        content.update(every.tobytes() + self._owners.tobytes())
        return content.hexdigest()

    def __len__(self) -> int:
        """Passages that can be found."""
        return len(self._ids)

    def find(self, text: str) -> dict[str, float]:
        """The ids of which `text` holds at least a gram, with the share of their grams.

        Letters and numbers that list choices at the beginnings of lines are passed over. Of an id
        with several texts the greatest share counts. A gram counts once, wherever and how often it
        stands.
        """
        hashes = hash_ngrams(fold(_LABELS.sub("", text)), self.n)
        top = (hashes >> np.uint64(64 - _FILTER_BITS)).view(np.int64)
        hits = _distinct(hashes[self._filter.take(top)])
        places = self._grams.searchsorted(hits)
        places = places[self._grams.take(places, mode="clip") == hits]
        first, copies = self._starts[places], self._starts[places + 1] - self._starts[places]
        within = np.arange(copies.sum()) - np.repeat(np.cumsum(copies) - copies, copies)
        counts = np.bincount(self._owners[np.repeat(first, copies) + within])
        passages = np.flatnonzero(counts)
        found = (counts[passages] / self._sizes[passages]).tolist()
        shares: dict[str, float] = {}
        for passage, share in zip(passages.tolist(), found, strict=True):
            question = self._ids[passage]
            if share > shares.get(question, 0.0):
                shares[question] = share
        return shares


def index_questions(texts: Mapping[str, Iterable[str]], n: int = QUESTION_GRAM) -> Questions:
    """An index of questions.

    Args:
        texts: the texts of each question by its id: the question alone, with its choices, ...
        n: letters of a gram.
    """
    ids, grams = [], []
    for question, versions in texts.items():
        for text in versions:
            found = _distinct(hash_ngrams(fold(_LABELS.sub("", text)), n))
            if len(found):
                ids.append(question)
                grams.append(found)
    sizes = np.array([len(found) for found in grams], np.int64)
    every = np.concatenate([np.zeros(0, np.uint64), *grams])
    owners = np.repeat(np.arange(len(ids)), sizes)
    order = np.argsort(every, kind="stable")
    present = np.zeros(1 << _FILTER_BITS, bool)
    present[every >> np.uint64(64 - _FILTER_BITS)] = True
    unchecked = tuple(question for question in texts if question not in set(ids))
    distinct, starts = np.unique(every[order], return_index=True)
    starts = np.append(starts, len(every))
    return Questions(n, unchecked, tuple(ids), sizes, distinct, starts, owners[order], present)


def sign(grams: UInt64[np.ndarray, "G"]) -> UInt32[np.ndarray, "K"]:
    """A MinHash signature of a set of n-grams: `BINS` numbers; equal ones tell of likeness.

    Each bin keeps the least of the hashes that fall into it; an empty bin takes that of another,
    chosen by its number. An empty set is all zeros.

    Source: one permutation hashing, Li, Owen, Zhang (2012); optimal densification, Shrivastava
    (2017).
    """
    if not len(grams):
        return np.zeros(BINS, np.uint32)
    hashes = np.sort(mix(grams))
    starts = np.arange(BINS, dtype=np.uint64) << np.uint64(64 - BINS.bit_length() + 1)
    first = np.searchsorted(hashes, starts)
    filled = np.diff(first, append=len(hashes)) > 0
    signature = hashes[np.minimum(first, len(hashes) - 1)].astype(np.uint32)
    for empty in np.flatnonzero(~filled):
        donors = _donors()[empty]
        signature[empty] = signature[donors[filled[donors]][0]]
    return signature


def likeness(
    left: UInt32[np.ndarray, "*N K"], right: UInt32[np.ndarray, "... K"]
) -> Float[np.ndarray, "*N"]:
    """The Jaccard similarity that signatures estimate: standard error 0.044 at most, if long."""
    return np.asarray(np.mean(left == right, axis=-1))


def band_keys(signatures: UInt32[np.ndarray, "*N K"]) -> UInt64[np.ndarray, "*N A"]:
    """What texts are looked up by: those that are alike very likely share one of these keys.

    Source: locality-sensitive hashing in bands; chapter 3 of Leskovec, Rajaraman, Ullman.
    """
    used = signatures[..., : _BANDS * _BAND_BINS].astype(np.uint64)
    bands = used.reshape(*signatures.shape[:-1], _BANDS, _BAND_BINS)
    keys = np.broadcast_to(np.arange(1, _BANDS + 1, dtype=np.uint64), bands.shape[:-1])
    for place in range(_BAND_BINS):
        keys = mix(keys * np.uint64(_MULTIPLIER) + bands[..., place])
    return keys


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """Sorted, each once; several times faster than np.unique."""
    hashes = np.sort(hashes)
    return hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]


@functools.cache
def _donors() -> np.ndarray:
    """For each bin all others in an order of its own, int [K, K - 1]."""
    rank = mix(np.arange(BINS * BINS, dtype=np.uint64)).reshape(BINS, BINS)
    rank[np.arange(BINS), np.arange(BINS)] = np.iinfo(np.uint64).max  # itself comes last
    return np.argsort(rank, axis=1, kind="stable")[:, :-1]


@functools.cache
def _fold_table() -> np.ndarray:
    """By code point of the basic plane: what it is compared as; 0: neither letter nor digit."""
    table = np.zeros(1 << 16, np.uint32)
    for code in range(len(table)):
        folded = unicodedata.normalize("NFKD", chr(code)).casefold()
        table[code] = next((ord(c) for c in folded if c.isalnum()), 0)
    table.flags.writeable = False
    return table
