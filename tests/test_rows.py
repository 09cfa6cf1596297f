"""Row layouts: what a target sees is what it would see in a sequence of its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_jax.data.packing import pack
from rpo_jax.data.rows import CHOSEN, PROMPT, REJECTED, PairLayout, pair_row, text_row

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


def pair(prompt, chosen, rejected):
    return {
        "prompt_ids": ids(*prompt),
        "chosen_ids": ids(*chosen),
        "rejected_ids": ids(*rejected),
    }


TWO = [pair([5, 6], [7, 2], [8, 9, 2]), pair([3], [4, 2], [2])]


def test_pairs_with_shared_prefixes_by_hand():
    layout = PairLayout(4, 4, share_prefix=True, prompt_targets=True)
    assert lists(pair_row(TWO, layout)) == {
        "tokens": [5, 6, 7, 2, 8, 9, 2, 3, 4, 2, 2, 0],
        "segment_ids": [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0],
        "branch_ids": [0, 0, 1, 1, 2, 2, 2, 0, 1, 1, 2, 0],
        "positions": [0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1, 0],
        "target_index": [1, 2, 1, 4, 5, 0, 7, 8, 7, 0, 0],
        "labels": [7, 2, 8, 9, 2, 6, 4, 2, 2, 0, 0],
        "target_pair": [0] * 6 + [1] * 3 + [0] * 2,
        "target_side": [CHOSEN] * 2 + [REJECTED] * 3 + [PROMPT] + [CHOSEN] * 2 + [REJECTED, 0, 0],
        "target_mask": [1] * 9 + [0] * 2,
    }


def test_pairs_with_two_prompts_by_hand():
    layout = PairLayout(4, 4, share_prefix=False)
    assert lists(pair_row(TWO, layout)) == {
        "tokens": [5, 6, 7, 2, 5, 6, 8, 9, 2, 3, 4, 2, 3, 2, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4, 0, 0],
        "branch_ids": [0] * 16,
        "positions": [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 0],
        "target_index": [1, 2, 5, 6, 7, 9, 10, 12],
        "labels": [7, 2, 8, 9, 2, 4, 2, 2],
        "target_pair": [0] * 5 + [1] * 3,
        "target_side": [CHOSEN] * 2 + [REJECTED] * 3 + [CHOSEN] * 2 + [REJECTED],
        "target_mask": [1] * 8,
    }


def test_a_pair_in_slots_by_hand():
    layout = PairLayout(3, 4, prompt_targets=True, in_slots=True)
    assert layout.slots == (3, 4, 4) and PairLayout(3, 4).slots == ()
    assert lists(pair_row(TWO[:1], layout)) == {
        "tokens": [5, 6, 0, 7, 2, 0, 0, 8, 9, 2, 0],
        "segment_ids": [1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0],
        "branch_ids": [0, 0, 0, 1, 1, 0, 0, 2, 2, 2, 0],
        "positions": [0, 1, 0, 2, 3, 0, 0, 2, 3, 4, 0],
        "target_index": [1, 3, 1, 7, 8, 0, 0, 0, 0, 0],
        "labels": [7, 2, 8, 9, 2, 6, 0, 0, 0, 0],
        "target_pair": [0] * 10,
        "target_side": [CHOSEN] * 2 + [REJECTED] * 3 + [PROMPT] + [0] * 4,
        "target_mask": [1] * 6 + [0] * 4,
    }


def test_stored_log_probs_lie_where_the_targets_lie():
    records = [{**r, "reference_logps": np.float32([-1, -2, -3, -4, -5, 0, 0])} for r in TWO]
    row = pair_row(records, PairLayout(4, 4))
    assert row["reference_logps"].dtype == np.float32
    assert row["reference_logps"].tolist() == [-1, -2, -3, -4, -5, -1, -2, -3]


SEQUENCE = st.lists(TOKEN, min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(st.tuples(SEQUENCE, SEQUENCE, SEQUENCE), min_size=1, max_size=3),
    share_prefix=st.booleans(),
    prompt_targets=st.booleans(),
    in_slots=st.booleans(),
)
def test_targets_see_what_they_would_see_alone(records, share_prefix, prompt_targets, in_slots):
    in_slots &= share_prefix and len(records) == 1
    layout = PairLayout(12, 12, share_prefix, prompt_targets, in_slots)
    row = pair_row([pair(*record) for record in records], layout)
    count = 0
    for place, (prompt, chosen, rejected) in enumerate(records):
        wanted = {
            CHOSEN: alone(prompt + chosen, len(prompt)),
            REJECTED: alone(prompt + rejected, len(prompt)),
            PROMPT: alone(prompt, 1) if prompt_targets else [],
        }
        for side, targets in wanted.items():
            is_own = (row["target_side"] == side) & (row["target_pair"] == place)
            own = np.flatnonzero(is_own & (row["target_mask"] == 1))
            assert [
                (visible(row, row["target_index"][m]), int(row["labels"][m])) for m in own
            ] == targets
            count += len(targets)
    assert row["target_mask"].sum() == count
    size = layout.row_size
    assert len(row["tokens"]) == size.tokens == (12 + 2 * 12 if share_prefix else 2 * (12 + 12))
    assert len(row["labels"]) == size.targets == 2 * 12 + (11 if prompt_targets else 0)
    assert not row["tokens"][row["segment_ids"] == 0].any()
    assert all(value.dtype == np.int32 for value in row.values())
    sizes = [layout.pair_size(pair(*record)) for record in records]
    assert sum(size.tokens for size in sizes) == (row["segment_ids"] > 0).sum()
    assert sum(size.targets for size in sizes) == count


def test_a_target_out_of_its_row_is_a_bug_not_a_cut():
    with pytest.raises(AssertionError):
        pair_row([pair([1], [1, 2, 3], [4])], PairLayout(1, 1))
    with pytest.raises(AssertionError):
        pair_row([pair([1], [], [4])], PairLayout(1, 2))


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
    for record in pack((("d", ids(*document)) for document in documents), 8):
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
