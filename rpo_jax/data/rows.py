"""Row layouts: how a record becomes the arrays that a model and a loss read.

A row holds `tokens`, `segment_ids`, `branch_ids` and `positions`, all int32 [T]. A query attends to
the keys of its own segment that stand no later in the row and whose branch is 0 or its own; segment
0 is padding. The targets say which tokens are predicted from where, and are what losses sum over.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from rpo_jax.data.packing import positions_from_segments

Row = dict[str, np.ndarray]
Ids = Int[np.ndarray, "..."]

CHOSEN, REJECTED, PROMPT = 0, 1, 2  # values of `target_side`


def text_row(record: Mapping[str, Ids]) -> Row:
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


def pair_row(
    prompt_ids: Ids,
    chosen_ids: Ids,
    rejected_ids: Ids,
    *,
    prompt_length: int,
    response_length: int,
    share_prefix: bool,
    prompt_targets: bool = False,
) -> Row:
    """One preference pair as one row of static slots, with its targets.

    With P = prompt_length and R = response_length the slots are, shared, prompt | chosen | rejected
    (T = P + 2R, one segment, branches 0, 1, 2) or, not shared, prompt | chosen | prompt | rejected
    (T = 2(P + R), segments 1 and 2, branch 0). Either way both responses see the prompt and
    themselves, and their positions start where the prompt's end: the two layouts give one result.

    The targets [M] come in the order chosen (R), rejected (R), prompt (P - 1, only with
    `prompt_targets`), each slot padded by `target_mask` = 0. The last prompt token predicts the
    first token of both responses, so its row index occurs twice. Prompt tokens are predicted once,
    all but the first.

    Args:
        prompt_ids: at least one token, at most P.
        chosen_ids: at least one token, at most R, its end of text included.
        rejected_ids: likewise.
        prompt_length: P, tokens.
        response_length: R, tokens.
        share_prefix: which layout.
        prompt_targets: whether the prompt's own tokens are targets too.

    Returns:
        int32 arrays. [T]: tokens, segment_ids, branch_ids, positions. [M]: target_index (row index
        of the hidden state), labels (token it predicts), target_pair (slot of the pair in the row:
        0), target_side (CHOSEN, REJECTED or PROMPT), target_mask.
    """
    n, responses = len(prompt_ids), (chosen_ids, rejected_ids)
    assert 1 <= n <= prompt_length, (n, prompt_length)
    assert all(1 <= len(ids) <= response_length for ids in responses), [len(r) for r in responses]
    chosen_at = prompt_length
    rejected_at = prompt_length + response_length + (0 if share_prefix else prompt_length)
    prompts_at = [0] if share_prefix else [0, prompt_length + response_length]

    row = {
        name: np.zeros(rejected_at + response_length, np.int32)
        for name in ("tokens", "segment_ids", "branch_ids", "positions")
    }
    target_count = 2 * response_length + (prompt_length - 1 if prompt_targets else 0)
    targets = {
        name: np.zeros(target_count, np.int32)
        for name in ("target_index", "labels", "target_pair", "target_side", "target_mask")
    }

    def place(at: int, ids: Ids, segment: int, branch: int, position: int) -> None:
        slot = slice(at, at + len(ids))
        row["tokens"][slot] = ids
        row["segment_ids"][slot] = segment
        row["branch_ids"][slot] = branch
        row["positions"][slot] = np.arange(position, position + len(ids))

    def predict(at: int, ids: Ids, index: Ids) -> None:
        slot = slice(at, at + len(ids))
        targets["target_index"][slot] = index
        targets["labels"][slot] = ids
        targets["target_mask"][slot] = 1

    for segment, at in enumerate(prompts_at, start=1):
        place(at, prompt_ids, segment, 0, 0)
    for side, (at, ids) in enumerate(zip((chosen_at, rejected_at), responses, strict=True)):
        place(at, ids, 1 if share_prefix else 1 + side, 1 + side if share_prefix else 0, n)
        last_prompt = n - 1 if share_prefix else prompts_at[side] + n - 1
        index = np.concatenate([[last_prompt], np.arange(at, at + len(ids) - 1)])
        predict(side * response_length, ids, index)
    if prompt_targets:
        predict(2 * response_length, prompt_ids[1:], np.arange(n - 1))
    sides = [CHOSEN] * response_length + [REJECTED] * response_length
    targets["target_side"][:] = np.pad(
        sides, (0, target_count - len(sides)), constant_values=PROMPT
    )
    return row | targets
