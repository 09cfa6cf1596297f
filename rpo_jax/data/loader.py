"""Batches whose order is a pure function of (seed, step)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]
Record = Mapping[str, Any]
MakeRow = Callable[[Sequence[Record]], Batch]
Arrange = Callable[[Sequence[Record]], list[list[int]]]

_NO_END = 1 << 53  # rows; grain counts batches in float64


def make_batches(
    source: Sequence[Record],
    make_row: MakeRow,
    *,
    batch_rows: int,
    seed: int,
    start_step: int = 0,
    own_rows: Sequence[int] | None = None,
    threads: int = 4,
    arrange: Arrange | None = None,
    row_records: int = 1,
) -> Iterator[Batch]:
    """Training batches without end.

    The records are repeated for ever, each epoch in a permutation of its own. Global step s is
    made of places s * batch_rows to (s + 1) * batch_rows - 1 of that sequence, and each process
    takes those of the rows that it holds: to resume, give the step; the number of processes, or the
    mesh, may have changed.

    Args:
        source: records by index.
        make_row: the records of a row to arrays whose shapes do not depend on them.
        batch_rows: records, and rows, of the global batch.
        seed: of the permutations.
        start_step: the first global step to yield.
        own_rows: the rows of the global batch that this process makes; None: all.
        threads: that read and make rows ahead of need.
        arrange: the records of a global batch to their places in each of its rows, `batch_rows`
            lists; None: each has the row of its own place. With it every process reads the records
            of all rows.
        row_records: most records of a row.

    Returns:
        The rows of this process, stacked: [own_rows, ...]; `record_index`, int32 [rows,
        row_records], tells which records a row holds, -1 none. A row without any is all zeros:
        every token padding, every target masked.
    """
    own = range(batch_rows) if own_rows is None else own_rows
    order = grain.MapDataset.range(len(source)).seed(seed % 2**32).shuffle().repeat()

    def row_at(local_place: int) -> Batch:
        step, row = divmod(local_place, len(own))
        return _row(source, make_row, order[step * batch_rows + own[row]])

    def batch_at(step: int) -> Batch:
        assert arrange is not None
        indices = [order[step * batch_rows + place] for place in range(batch_rows)]
        records = [source[index] for index in indices]
        arranged = arrange(records)
        rows = [arranged[row] for row in own]
        made = [
            {
                **make_row([records[place] for place in row]),
                "record_index": _indices([indices[place] for place in row], row_records),
            }
            for row in rows
            if row
        ]
        filler = _filler(made[0] if made else _row(source, make_row, indices[0]), row_records)
        full = iter(made)
        return _stack([next(full) if row else filler for row in rows])

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * len(own))
    if arrange is None:
        places = grain.MapDataset.range(start_step * len(own), _NO_END)
        return iter(places.map(row_at).batch(len(own)).to_iter_dataset(options))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(grain.MapDataset.range(start_step, _NO_END).map(batch_at).to_iter_dataset(options))


def iterate_once(
    source: Sequence[Record],
    make_row: MakeRow,
    *,
    batch_rows: int,
    limit: int = 0,
    own_rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every record once, in order, a row each, in batches of one shape.

    Args:
        source: records by index; at least one.
        make_row: as in `make_batches`.
        batch_rows: rows of the global batch.
        limit: stop after so many records; 0: after all.
        own_rows: as in `make_batches`.

    Yields:
        Batches as `make_batches` does, the last one filled up with empty rows.
    """
    own = range(batch_rows) if own_rows is None else own_rows
    count = min(limit or len(source), len(source))
    filler = _filler(_row(source, make_row, 0), 1)
    for start in range(0, count, batch_rows):
        places = [start + row for row in own]
        yield _stack([_row(source, make_row, i) if i < count else filler for i in places])


def _row(source: Sequence[Record], make_row: MakeRow, index: int) -> Batch:
    return {**make_row([source[index]]), "record_index": _indices([index], 1)}


def _filler(row: Batch, most: int) -> Batch:
    """An empty row in the form of another."""
    empty = {name: np.zeros_like(value) for name, value in row.items()}
    return empty | {"record_index": _indices([], most)}


def _indices(indices: list[int], most: int) -> np.ndarray:
    return np.array(indices + [-1] * (most - len(indices)), np.int32)


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
