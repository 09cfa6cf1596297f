"""Records as a reader sees them: text in colour, what is trained apart from what is given."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rpo_jax.data.rows import text_row
from rpo_jax.data.tokenizer import Tokenizer

_RESET, _DIM, _GREEN, _RED, _BOLD = "\033[0m", "\033[2m", "\033[32m", "\033[31m", "\033[1m"


def show_record(record: Mapping[str, Any], tokenizer: Tokenizer, colour: bool = True) -> str:
    """A text row, or a preference pair, as text.

    What the loss predicts is green (of a rejected response red), what is only read is dim. Without
    colour, what is only read stands in ⟦brackets⟧.

    Args:
        record: of a record set.
        tokenizer: that the set was made with.
        colour: for a terminal.
    """
    pieces = _show_pair(record) if "prompt_ids" in record else _show_row(record)
    lines = []
    for title, ids, trained, style in pieces:
        lines.append(f"{_BOLD}{title}{_RESET}" if colour else title)
        runs = ((style, part, t) for part, t in _find_runs(ids, trained))
        lines.append("".join(_paint(tokenizer.decode(p), s, t, colour) for s, p, t in runs))
    return "\n".join(lines)


def _show_pair(record: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    for name, trained, style in (
        ("prompt", False, _DIM),
        ("chosen", True, _GREEN),
        ("rejected", True, _RED),
    ):
        ids = np.asarray(record[f"{name}_ids"])
        title = f"{record['id']}, {name}, {len(ids)} tokens"
        yield title, ids, np.full(len(ids), trained), style


def _show_row(record: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    row = text_row(record)
    predicted = np.append(False, row["target_mask"][:-1] > 0)
    for segment, name in enumerate(record["documents"].split("\n"), start=1):
        place = row["segment_ids"] == segment
        ids = row["tokens"][place]
        yield f"{name}, {len(ids)} tokens", ids, predicted[place], _GREEN
    if padding := int((row["segment_ids"] == 0).sum()):
        nothing = np.zeros(0, np.int32)
        yield f"{padding} tokens of padding", nothing, nothing > 0, _DIM


def _find_runs(ids: np.ndarray, trained: np.ndarray) -> Iterator[tuple[Sequence[int], bool]]:
    """Ids in a row that are alike."""
    cuts = np.flatnonzero(trained[1:] != trained[:-1]) + 1
    for part, same in zip(np.split(ids, cuts), np.split(trained, cuts), strict=True):
        if len(part):
            yield part.tolist(), bool(same[0])


def _paint(text: str, style: str, trained: bool, colour: bool) -> str:
    if colour:
        return f"{style if trained else _DIM}{text}{_RESET}"
    return text if trained else f"⟦{text}⟧"
