"""Filters: what of a text is kept, and whether the text is; each decides about one text alone."""

import re
from collections.abc import Callable

import numpy as np

from rpo_jax.config import Corpus
from rpo_jax.data.overlap import fold, hash_ngrams

REPEAT_GRAM = 10  # letters
Clean = Callable[[str], tuple[str, str]]


def make_clean(corpus: Corpus) -> Clean:
    """A function from a text to what remains of it, and the reason to leave it out ("": none)."""
    lines = re.compile("|".join(f"(?:{pattern})" for pattern in corpus.boilerplate_lines))

    def clean(text: str) -> tuple[str, str]:
        if corpus.boilerplate_lines:
            kept = [line for line in text.splitlines(keepends=True) if not lines.search(line)]
            text = "".join(kept)
        if not text.strip():
            return text, "empty"
        if len(text) < corpus.min_characters:
            return text, f"shorter than data.corpus.min_characters={corpus.min_characters}"
        if 0 < corpus.max_characters < len(text):
            return text, f"longer than data.corpus.max_characters={corpus.max_characters}"
        if corpus.min_kana_share and kana_share(text) < corpus.min_kana_share:
            return text, f"kana below data.corpus.min_kana_share={corpus.min_kana_share:g}"
        if corpus.max_repetition < 1 and repetition(text) > corpus.max_repetition:
            return text, f"repetition above data.corpus.max_repetition={corpus.max_repetition:g}"
        return text, ""

    return clean


def kana_share(text: str) -> float:
    """The share of kana among letters and digits: near 0.5 in Japanese, 0 in Chinese or English."""
    codes = fold(text)
    kana = (codes >= 0x3041) & (codes <= 0x30FF)
    return float(np.mean(kana)) if len(codes) else 0.0


def repetition(text: str) -> float:
    """The share of the runs of 10 letters in a text that stood there before; 0: none."""
    grams = np.sort(hash_ngrams(fold(text), REPEAT_GRAM))
    return np.count_nonzero(grams[1:] == grams[:-1]) / max(len(grams), 1)
