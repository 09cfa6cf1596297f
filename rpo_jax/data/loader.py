"""Batches whose order is a pure function of (seed, step)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]
MakeRow = Callable[[Mapping[str, Any]], dict[str, np.ndarray]]

_NO_END = 1 << 53  # rows; grain counts batches in float64


def make_batches(
    source: Sequence[Mapping[str, Any]],
    make_row: MakeRow,
    *,
    batch_rows: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
) -> Iterator[Batch]:
    """Training batches without end.

    The records are repeated for ever, each epoch in a permutation of its own. Global step s is
    made of places s * batch_rows to (s + 1) * batch_rows - 1 of that sequence, and each process
    takes its contiguous part: to resume, give the step; the number of processes may have changed.

    Args:
        source: records by index.
        make_row: a record to arrays whose shapes do not depend on the record.
        batch_rows: rows of the global batch, a multiple of `process_count`.
        seed: of the permutations.
        start_step: the first global step to yield.
        process_index: this process.
        process_count: all processes.
        threads: that read and make rows ahead of need.

    Returns:
        The rows of this process, stacked: [batch_rows / process_count, ...]; `record_index`, int32,
        tells which record a row is.
    """
    assert batch_rows % process_count == 0, (batch_rows, process_count)
    local_rows = batch_rows // process_count
    order = grain.MapDataset.range(len(source)).seed(seed % 2**32).shuffle().repeat()

    def row_at(local_place: int) -> Batch:
        step, row = divmod(local_place, local_rows)
        return _row(source, make_row, order[step * batch_rows + process_index * local_rows + row])

    places = grain.MapDataset.range(start_step * local_rows, _NO_END)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * local_rows)
    return iter(places.map(row_at).batch(local_rows).to_iter_dataset(options))


def iterate_once(
    source: Sequence[Mapping[str, Any]],
    make_row: MakeRow,
    *,
    batch_rows: int,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every record once, in order, in batches of one shape.

    Args:
        source: records by index; at least one.
        make_row: as in `make_batches`.
        batch_rows: rows of the global batch, a multiple of `process_count`.
        limit: stop after so many records; 0: after all.
        process_index: this process.
        process_count: all processes.

    Yields:
        Batches as `make_batches` does. Rows that fill up the last one are all zeros (every token
        padding, every target masked) with `record_index` -1.
    """
    assert batch_rows % process_count == 0, (batch_rows, process_count)
    local_rows = batch_rows // process_count
    count = min(limit or len(source), len(source))
    filler = {name: np.zeros_like(value) for name, value in _row(source, make_row, 0).items()}
    filler["record_index"] = np.array(-1, np.int32)
    for start in range(process_index * local_rows, _round_up(count, batch_rows), batch_rows):
        places = range(start, start + local_rows)
        rows = [_row(source, make_row, i) if i < count else filler for i in places]
        yield {name: np.stack([row[name] for row in rows]) for name in filler}


def _row(source: Sequence[Mapping[str, Any]], make_row: MakeRow, index: int) -> Batch:
    return {**make_row(source[index]), "record_index": np.array(index, np.int32)}


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
