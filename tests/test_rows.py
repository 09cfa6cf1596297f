"""Row layouts: what a target sees is what it would see in a sequence of its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_jax.data.packing import pack
from rpo_jax.data.rows import CHOSEN, PROMPT, REJECTED, pair_row, text_row

TOKEN = st.integers(1, 50)


def ids(*tokens):
    return np.array(tokens, np.int32)


def lists(row):
    return {name: value.tolist() for name, value in row.items()}


def visible(row, query):
    """(token, position) of the keys that a query attends to, itself included, in row order."""
    branches = row.get("branch_ids", np.zeros_like(row["tokens"]))
    return tuple(
        (int(row["tokens"][key]), int(row["positions"][key]))
        for key in range(query + 1)
        if row["segment_ids"][key] == row["segment_ids"][query] != 0
        and branches[key] in (0, branches[query])
    )


def alone(sequence, start):
    """(context, label) of each token of a lone sequence, from place `start` on."""
    pairs = [(int(token), place) for place, token in enumerate(sequence)]
    return [(tuple(pairs[:place]), pairs[place][0]) for place in range(start, len(pairs))]


def test_pair_row_with_shared_prefix_by_hand():
    row = pair_row(
        ids(5, 6),
        ids(7, 2),
        ids(8, 9, 2),
        prompt_length=4,
        response_length=3,
        share_prefix=True,
        prompt_targets=True,
    )
    assert lists(row) == {
        "tokens": [5, 6, 0, 0, 7, 2, 0, 8, 9, 2],
        "segment_ids": [1, 1, 0, 0, 1, 1, 0, 1, 1, 1],
        "branch_ids": [0, 0, 0, 0, 1, 1, 0, 2, 2, 2],
        "positions": [0, 1, 0, 0, 2, 3, 0, 2, 3, 4],
        "target_index": [1, 4, 0, 1, 7, 8, 0, 0, 0],
        "labels": [7, 2, 0, 8, 9, 2, 6, 0, 0],
        "target_pair": [0] * 9,
        "target_side": [CHOSEN] * 3 + [REJECTED] * 3 + [PROMPT] * 3,
        "target_mask": [1, 1, 0, 1, 1, 1, 1, 0, 0],
    }


def test_pair_row_with_two_prompts_by_hand():
    row = pair_row(
        ids(5, 6), ids(7, 2), ids(8, 9, 2), prompt_length=3, response_length=3, share_prefix=False
    )
    assert lists(row) == {
        "tokens": [5, 6, 0, 7, 2, 0, 5, 6, 0, 8, 9, 2],
        "segment_ids": [1, 1, 0, 1, 1, 0, 2, 2, 0, 2, 2, 2],
        "branch_ids": [0] * 12,
        "positions": [0, 1, 0, 2, 3, 0, 0, 1, 0, 2, 3, 4],
        "target_index": [1, 3, 0, 7, 9, 10],
        "labels": [7, 2, 0, 8, 9, 2],
        "target_pair": [0] * 6,
        "target_side": [CHOSEN] * 3 + [REJECTED] * 3,
        "target_mask": [1, 1, 0, 1, 1, 1],
    }


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(TOKEN, min_size=1, max_size=5),
    chosen=st.lists(TOKEN, min_size=1, max_size=4),
    rejected=st.lists(TOKEN, min_size=1, max_size=4),
    share_prefix=st.booleans(),
    prompt_targets=st.booleans(),
)
def test_targets_see_what_they_would_see_alone(
    prompt, chosen, rejected, share_prefix, prompt_targets
):
    row = pair_row(
        ids(*prompt),
        ids(*chosen),
        ids(*rejected),
        prompt_length=5,
        response_length=4,
        share_prefix=share_prefix,
        prompt_targets=prompt_targets,
    )
    wanted = {
        CHOSEN: alone(prompt + chosen, len(prompt)),
        REJECTED: alone(prompt + rejected, len(prompt)),
        PROMPT: alone(prompt, 1) if prompt_targets else [],
    }
    for side, targets in wanted.items():
        chosen_targets = np.flatnonzero((row["target_side"] == side) & (row["target_mask"] == 1))
        assert [
            (visible(row, row["target_index"][m]), int(row["labels"][m])) for m in chosen_targets
        ] == targets
    assert row["target_mask"].sum() == sum(map(len, wanted.values()))
    assert len(row["tokens"]) == (5 + 2 * 4 if share_prefix else 2 * (5 + 4))
    assert len(row["labels"]) == 2 * 4 + (4 if prompt_targets else 0)
    assert not row["tokens"][row["segment_ids"] == 0].any()
    assert all(value.dtype == np.int32 for value in row.values())


def test_a_target_out_of_its_slot_is_a_bug_not_a_cut():
    with pytest.raises(AssertionError):
        pair_row(
            ids(1), ids(1, 2, 3), ids(4), prompt_length=1, response_length=2, share_prefix=True
        )
    with pytest.raises(AssertionError):
        pair_row(ids(1), ids(), ids(4), prompt_length=1, response_length=2, share_prefix=True)


def test_text_row_by_hand():
    row = text_row({"tokens": ids(3, 4, 2, 5, 2, 0), "segment_ids": ids(1, 1, 1, 2, 2, 0)})
    assert lists(row) == {
        "tokens": [3, 4, 2, 5, 2, 0],
        "segment_ids": [1, 1, 1, 2, 2, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "labels": [4, 2, 0, 2, 0, 0],
        "target_mask": [1, 1, 0, 1, 0, 0],
    }


@settings(max_examples=50, deadline=None)
@given(documents=st.lists(st.lists(TOKEN, min_size=1, max_size=9), min_size=1, max_size=8))
def test_packed_text_sees_its_own_document_only(documents):
    found = []
    for record in pack((ids(*document) for document in documents), 8):
        row = text_row(record)
        for t in np.flatnonzero(row["target_mask"]):
            found.append((visible(row, t), int(row["labels"][t])))
    pieces, filled = [], 0
    for document in documents:  # the same documents, cut by hand where rows end
        while document:
            pieces.append(document[: 8 - filled])
            document = document[8 - filled :]
            filled = (filled + len(pieces[-1])) % 8
    assert found == [target for piece in pieces for target in alone(piece, 1)]
