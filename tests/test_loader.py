"""The loader: order is a function of (seed, step) and of nothing else."""

import itertools

import numpy as np
import pytest

from rpo_jax.data.loader import iterate_once, make_batches
from rpo_jax.errors import UserError

SOURCE = [{"value": 10 * index} for index in range(7)]


def make_row(records):
    return {"value": np.full(2, sum(record["value"] for record in records), np.int32)}


def draw(steps, batch_rows=4, seed=3, **more):
    batches = make_batches(SOURCE, make_row, batch_rows=batch_rows, seed=seed, **more)
    return [batch["record_index"].ravel().tolist() for batch in itertools.islice(batches, steps)]


def test_each_epoch_is_a_permutation_and_they_differ():
    places = np.concatenate(draw(14))
    epochs = places[:56].reshape(8, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 6


def test_the_order_is_pinned():
    """A library update that changes the order breaks the promise that a run can be resumed."""
    assert draw(3) == PINNED


PINNED = [[4, 6, 0, 2], [5, 3, 1, 2], [1, 3, 4, 6]]


def test_seeds_differ_and_are_not_shifted_copies():
    one, two = (list(itertools.chain(*draw(21, seed=seed))) for seed in (0, 1))
    assert one != two
    assert one[7:] != two[:-7]


def test_rows_belong_to_their_index():
    for batch in itertools.islice(make_batches(SOURCE, make_row, batch_rows=4, seed=0), 5):
        assert batch["value"].shape == (4, 2) and batch["value"].dtype == np.int32
        assert batch["record_index"].dtype == np.int32
        np.testing.assert_array_equal(batch["value"][:, :1], 10 * batch["record_index"])


@pytest.mark.parametrize("start", [1, 5, 40])
def test_a_start_step_is_the_same_as_going_there(start):
    assert draw(3, start_step=start) == draw(start + 3)[start:]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_global_batch_in_order(count):
    parts = [draw(5, own_rows=rows.tolist()) for rows in np.split(np.arange(4), count)]
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == draw(5)


def test_a_process_may_hold_any_rows():
    assert draw(5, own_rows=[0, 3]) == [[rows[0], rows[3]] for rows in draw(5)]


def test_threads_do_not_change_the_order():
    assert draw(20, threads=1) == draw(20, threads=8)


def test_an_error_of_a_record_comes_through():
    def fail(records):
        raise UserError(f"record {records[0]['value']} is damaged")

    with pytest.raises(UserError, match=r"record \d+ is damaged"):
        next(make_batches(SOURCE, fail, batch_rows=2, seed=0))


@pytest.mark.parametrize(("limit", "wanted"), [(0, 7), (5, 5), (100, 7)])
def test_once_is_every_record_in_order_then_filler(limit, wanted):
    batches = list(iterate_once(SOURCE, make_row, batch_rows=4, limit=limit))
    assert all(batch["value"].shape == (4, 2) for batch in batches)
    index = np.concatenate([batch["record_index"].ravel() for batch in batches])
    value = np.concatenate([batch["value"] for batch in batches])
    assert index.tolist() == [*range(wanted), *[-1] * (8 - wanted)]
    np.testing.assert_array_equal(value[:, 0], [*range(0, 10 * wanted, 10), *[0] * (8 - wanted)])
    assert index.dtype == np.int32


def test_once_is_shared_by_processes_with_one_count_of_batches():
    parts = [
        list(iterate_once(SOURCE, make_row, batch_rows=4, own_rows=rows))
        for rows in ([0, 1], [2, 3])
    ]
    assert len(parts[0]) == len(parts[1]) == 2
    joined = [
        np.concatenate([batch["record_index"].ravel() for batch in step]).tolist()
        for step in zip(*parts, strict=True)
    ]
    assert joined == [[0, 1, 2, 3], [4, 5, 6, -1]]


def in_twos(records):
    """Two records a row, in order; the rows that are left stay empty."""
    places = list(range(len(records)))
    rows = [places[i : i + 2] for i in range(0, len(places), 2)]
    return rows + [[]] * (len(records) - len(rows))


def test_arranged_rows_hold_the_records_of_the_same_step():
    plain = draw(9, batch_rows=6)
    batches = make_batches(
        SOURCE, make_row, batch_rows=6, seed=3, arrange=in_twos, row_records=2, start_step=2
    )
    for wanted, batch in zip(plain[2:], batches, strict=False):
        index = batch["record_index"]
        assert index.shape == (6, 2) and batch["value"].shape == (6, 2)
        assert index.ravel().tolist() == [*wanted, *[-1] * 6]
        values = np.where(index < 0, 0, 10 * index).sum(axis=1)
        np.testing.assert_array_equal(batch["value"][:, 0], values)


def test_arranged_rows_are_shared_by_processes():
    def rows(**more):
        batches = make_batches(
            SOURCE, make_row, batch_rows=4, seed=0, arrange=in_twos, row_records=2, **more
        )
        return [batch["record_index"].tolist() for batch in itertools.islice(batches, 4)]

    parts = [rows(own_rows=[row]) for row in range(4)]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == rows()
