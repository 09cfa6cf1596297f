"""Packing: nothing is lost, nothing is mixed, nearly nothing is padded."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_jax.data.packing import pack, positions_from_segments

EOS = 1


def documents_of(lengths):
    """Documents of unlike tokens, each ending in EOS."""
    return [np.append(np.arange(2, length + 1), EOS).astype(np.int32) for length in lengths]


def test_rows_by_hand():
    rows = list(pack(documents_of([2, 5, 1]), 3))
    assert [row["tokens"].tolist() for row in rows] == [[2, 1, 2], [3, 4, 5], [1, 1, 0]]
    assert [row["segment_ids"].tolist() for row in rows] == [[1, 1, 2], [1, 1, 1], [1, 2, 0]]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), row_length=st.integers(1, 17))
def test_every_token_is_there_once_and_only_the_last_row_is_padded(lengths, row_length):
    documents = documents_of(lengths)
    rows = list(pack(documents, row_length))
    tokens = np.concatenate([row["tokens"] for row in rows] or [[]])
    segments = np.concatenate([row["segment_ids"] for row in rows] or [[]])
    total = sum(lengths)
    assert len(rows) == -(-total // row_length)
    np.testing.assert_array_equal(tokens[:total], np.concatenate([*documents, []]))
    assert not tokens[total:].any()
    assert (segments[:total] > 0).all() and not segments[total:].any()
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for place in range(1, total):
        if place % row_length:
            same_document = owner[place] == owner[place - 1]
            assert (segments[place] == segments[place - 1]) == same_document
    for row in rows:
        assert row["tokens"].dtype == row["segment_ids"].dtype == np.int32
        assert row["segment_ids"][0] == 1
        assert (np.diff(row["segment_ids"][row["segment_ids"] > 0]) <= 1).all()


def test_fill_is_above_999_permille():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 700, size=2000)
    rows = list(pack(documents_of(lengths), 512))
    assert lengths.sum() / (len(rows) * 512) > 0.999


def test_rows_are_made_as_documents_arrive():
    def endless():
        while True:
            yield np.array([5, EOS], np.int32)

    rows = pack(endless(), 4)
    assert next(rows)["segment_ids"].tolist() == [1, 1, 2, 2]
    first, second = next(rows), next(rows)
    assert first["tokens"] is not second["tokens"]


@given(segments=st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_positions_restart_with_each_segment(segments):
    wanted, position = [], 0
    for place, segment in enumerate(segments):
        position = position + 1 if place and segment == segments[place - 1] else 0
        wanted.append(position)
    assert positions_from_segments(np.array(segments, np.int32)).tolist() == wanted
