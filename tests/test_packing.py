"""Packing: nothing is lost, nothing is mixed, nearly nothing is padded."""

import functools
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_jax.data.packing import Size, deal_rows, pack, plan_rows, positions_from_segments

EOS = 1


def documents_of(lengths):
    """Documents of unlike tokens, each ending in EOS."""
    return [
        (f"d{i}", np.append(np.arange(2, length + 1), EOS).astype(np.int32))
        for i, length in enumerate(lengths)
    ]


def test_rows_by_hand():
    rows = list(pack(documents_of([2, 5, 1]), 3))
    assert [row["tokens"].tolist() for row in rows] == [[2, 1, 2], [3, 4, 5], [1, 1, 0]]
    assert [row["segment_ids"].tolist() for row in rows] == [[1, 1, 2], [1, 1, 1], [1, 2, 0]]
    assert [row["documents"] for row in rows] == ["d0\nd1", "d1", "d1\nd2"]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), row_length=st.integers(1, 17))
def test_every_token_is_there_once_and_only_the_last_row_is_padded(lengths, row_length):
    documents = documents_of(lengths)
    rows = list(pack(documents, row_length))
    tokens = np.concatenate([row["tokens"] for row in rows] or [[]])
    segments = np.concatenate([row["segment_ids"] for row in rows] or [[]])
    total = sum(lengths)
    assert len(rows) == -(-total // row_length)
    everything = np.concatenate([*(ids for _, ids in documents), []])
    np.testing.assert_array_equal(tokens[:total], everything)
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


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), row_length=st.integers(1, 17))
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row_length):
    documents = documents_of(lengths)
    rows = list(pack(documents, row_length, best_fit=True))
    pieces = {name: [] for name, _ in documents}
    for row in rows:
        names = row["documents"].split("\n")
        assert sorted(set(row["segment_ids"][row["segment_ids"] > 0])) == list(
            range(1, len(names) + 1)
        )
        for segment, name in enumerate(names, start=1):
            pieces[name].append(row["tokens"][row["segment_ids"] == segment].tolist())
    for name, ids in documents:
        assert sorted(itertools.chain(*pieces[name])) == sorted(ids.tolist())
        assert len(pieces[name]) == -(-len(ids) // row_length)
        assert sum(piece[-1] == EOS for piece in pieces[name]) == 1
    # Two rows that would go into one would be one.
    room = sorted((int((row["segment_ids"] == 0).sum()) for row in rows), reverse=True)
    assert all(row_length - room[0] > room[1] for _ in rows[1:2])


def test_best_fit_fills_rows():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1.0, size=2000).astype(int) + 1, 5000)
    rows = list(pack(documents_of(lengths), 2048, best_fit=True))
    assert lengths.sum() / (len(rows) * 2048) > 0.99


def test_rows_are_made_as_documents_arrive():
    def endless():
        while True:
            yield "d", np.array([5, EOS], np.int32)

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


PAIR_SIZE = st.builds(Size, st.integers(1, 10), st.integers(1, 6))


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(PAIR_SIZE, min_size=1, max_size=12), most=st.integers(1, 4))
def test_every_pair_has_one_place_in_a_row_that_holds_it(sizes, most):
    room = Size(10, 6)
    rows = plan_rows(sizes, room, most)
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    used = [functools.reduce(Size.__add__, (sizes[i] for i in row)) for row in rows]
    assert all(size.fits(room) for size in used)
    assert all(1 <= len(row) <= most for row in rows)
    assert [size.tokens for size in used] == sorted((s.tokens for s in used), reverse=True)
    if most == 1:
        assert len(rows) == len(sizes)
    assert rows == plan_rows(sizes, room, most)


def test_short_pairs_share_rows():
    sizes = [Size(tokens, 1) for tokens in (3, 8, 2, 5, 2)]
    assert plan_rows(sizes, Size(10, 9), most=3) == [[1, 2], [3, 0, 4]]
    assert plan_rows(sizes, Size(10, 1), most=3) == [[1], [3], [0], [2], [4]]


def test_dealt_rows_come_back_together():
    rows = [[4], [0, 1], [3], [2]]
    dealt = deal_rows(rows, count=6, parts=3)
    assert dealt == [[4], [3], [], [0, 1], [2], []]
    assert [dealt[part::3] for part in range(3)] == [[[4], [0, 1]], [[3], [2]], [[], []]]


def test_fractions_of_a_row():
    assert Size(10, 4).fractions(3) == (Size(4, 2), Size(7, 3), Size(10, 4))
    assert Size(10, 4).fractions(1) == (Size(10, 4),)
