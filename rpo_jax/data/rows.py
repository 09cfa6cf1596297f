"""Row layouts: how records become the arrays that a model and a loss read.

A row holds `tokens`, `segment_ids`, `branch_ids` and `positions`, all int32 [T]. A query attends to
the keys of its own segment that stand no later in the row and whose branch is 0 or its own; segment
0 is padding. The targets say which tokens are predicted from where, and are what losses sum over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from rpo_jax.data.packing import Size, positions_from_segments

Row = dict[str, np.ndarray]
Ids = Int[np.ndarray, "..."]

CHOSEN, REJECTED, PROMPT = 0, 1, 2  # values of `target_side`

TOKEN_ARRAYS = ("tokens", "segment_ids", "branch_ids", "positions")
TARGET_ARRAYS = (
    "target_index",
    "labels",
    "target_pair",
    "target_side",
    "target_mask",
    "reference_logps",
)


def text_row(record: Mapping[str, Any]) -> Row:
    """A packed text row for next-token prediction.

    A token is predicted by its predecessor in the same segment, so the first token of a document
    (or of the part of it that a row begins with) is not predicted.

    Args:
        record: `tokens` and `segment_ids`, [T].

    Returns:
        tokens, segment_ids, positions, labels and target_mask, int32 [T]: the hidden state at t
        predicts `labels[t]`, the token at t + 1, where `target_mask[t]` is 1.
    """
    tokens = np.asarray(record["tokens"], np.int32)
    segment_ids = np.asarray(record["segment_ids"], np.int32)
    target_mask = np.zeros_like(tokens)
    target_mask[:-1] = (segment_ids[1:] == segment_ids[:-1]) & (segment_ids[1:] != 0)
    labels = np.zeros_like(tokens)
    labels[:-1] = tokens[1:] * target_mask[:-1]
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": positions_from_segments(segment_ids),
        "labels": labels,
        "target_mask": target_mask,
    }


@dataclass(frozen=True)
class PairLayout:
    """How preference pairs lie in a row.

    A pair is prompt, chosen, rejected (one segment, branches 0, 1, 2) where the prefix is shared,
    and prompt, chosen, prompt, rejected (two segments, branch 0) where it is not. Either way both
    responses see the prompt and themselves, and their positions start where the prompt's end: the
    two layouts give one result. Pairs stand one after the other; the rest of a row is padding. Or a
    row is one pair, whose parts begin where the longest ones would: then who sees whom is known
    before any row is.

    Attributes:
        prompt_length: most tokens of a prompt.
        response_length: most tokens of a response, its end of text included.
        share_prefix: whether one copy of the prompt serves both responses.
        prompt_targets: whether the prompt's own tokens are targets too.
        in_slots: whether a row is one pair in slots of fixed lengths; the prefix is shared.
    """

    prompt_length: int
    response_length: int
    share_prefix: bool = True
    prompt_targets: bool = False
    in_slots: bool = False

    @property
    def slots(self) -> tuple[int, ...]:
        """Lengths of the slots of prompt, chosen and rejected; empty: there are none."""
        lengths = (self.prompt_length, self.response_length, self.response_length)
        return lengths if self.in_slots else ()

    @property
    def row_size(self) -> Size:
        """Of a row: it holds the longest pair there may be."""
        return self._size(self.prompt_length, self.response_length, self.response_length)

    def pair_size(self, record: Mapping[str, Ids]) -> Size:
        """What a pair takes of a row."""
        return self._size(*(len(record[f"{x}_ids"]) for x in ("prompt", "chosen", "rejected")))

    def _size(self, prompt: int, chosen: int, rejected: int) -> Size:
        return Size(
            tokens=prompt * (1 if self.share_prefix else 2) + chosen + rejected,
            targets=chosen + rejected + (prompt - 1 if self.prompt_targets else 0),
        )


def pair_row(records: Sequence[Mapping[str, Any]], layout: PairLayout) -> Row:
    """Preference pairs as one row, with its targets.

    The targets of a pair come in the order chosen, rejected, prompt (all but its first token, only
    with `prompt_targets`). The last prompt token predicts the first token of both responses: where
    the prefix is shared, its index occurs twice.

    Args:
        records: `prompt_ids`, `chosen_ids` and `rejected_ids` of each pair, all with a token at
            least; optionally `reference_logps`, a number a target, and after them whatever.
        layout: of the row, which must hold them.

    Returns:
        int32 arrays. [T]: tokens, segment_ids, branch_ids, positions. [M]: target_index (row index
        of the hidden state), labels (token it predicts), target_pair (place of the pair in the
        row), target_side (CHOSEN, REJECTED or PROMPT), target_mask; padding is 0. Where records
        have them also reference_logps, float32 [M].
    """
    tokens, segments, pairs = 0, 0, []
    for place, record in enumerate(records):
        pair = _make_pair(record, layout)
        pair["target_pair"] = np.full_like(pair["labels"], place)
        pair["target_index"] += tokens
        pair["segment_ids"] += segments
        tokens, segments = tokens + len(pair["tokens"]), int(pair["segment_ids"].max())
        pairs.append(pair)
    size = layout.row_size
    return {
        name: _join([pair[name] for pair in pairs], length)
        for names, length in ((TOKEN_ARRAYS, size.tokens), (TARGET_ARRAYS, size.targets))
        for name in names
        if name in pairs[0]
    }


def _make_pair(record: Mapping[str, Any], layout: PairLayout) -> Row:
    """A pair in a row of its own, without padding but that of slots."""
    prompt, chosen, rejected = (record[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
    assert min(len(prompt), len(chosen), len(rejected)) >= 1, "checked when records are made"
    n = len(prompt)
    # Ids, segment, branch and first position of each part.
    if layout.share_prefix:
        parts = [(prompt, 1, 0, 0), (chosen, 1, 1, n), (rejected, 1, 2, n)]
    else:
        parts = [(prompt, 1, 0, 0), (chosen, 1, 0, n), (prompt, 2, 0, 0), (rejected, 2, 0, n)]
    lengths = layout.slots or tuple(len(ids) for ids, *_ in parts)
    _, chosen_at, *_, rejected_at = (sum(lengths[:place]) for place in range(len(parts)))
    last_prompt = n - 1 if layout.share_prefix else rejected_at - 1
    # Side, labels, and where each is predicted.
    targets = [
        (CHOSEN, chosen, [n - 1, *range(chosen_at, chosen_at + len(chosen) - 1)]),
        (REJECTED, rejected, [last_prompt, *range(rejected_at, rejected_at + len(rejected) - 1)]),
    ]
    if layout.prompt_targets:
        targets.append((PROMPT, prompt[1:], list(range(n - 1))))

    def join(arrays: list[Any]) -> np.ndarray:
        return np.concatenate(arrays).astype(np.int32)

    def lay(arrays: list[Any]) -> np.ndarray:
        return join([_join([x], length) for x, length in zip(arrays, lengths, strict=True)])

    pair = {
        "tokens": lay([ids for ids, *_ in parts]),
        "segment_ids": lay([np.full(len(ids), segment) for ids, segment, _, _ in parts]),
        "branch_ids": lay([np.full(len(ids), branch) for ids, _, branch, _ in parts]),
        "positions": lay([start + np.arange(len(ids)) for ids, _, _, start in parts]),
        "labels": join([labels for _, labels, _ in targets]),
        "target_index": join([index for _, _, index in targets]),
        "target_side": join([np.full(len(labels), side) for side, labels, _ in targets]),
    }
    pair["target_mask"] = np.ones_like(pair["labels"])
    if "reference_logps" in record:
        pair["reference_logps"] = record["reference_logps"][: len(pair["labels"])]
    return pair


def _join(arrays: list[np.ndarray], length: int) -> np.ndarray:
    """The arrays one after the other, filled up with zeros."""
    joined = np.concatenate(arrays)
    assert len(joined) <= length, (len(joined), length)
    return np.pad(joined, (0, length - len(joined)))
