"""Moving tensors piece by piece: memory under a budget, several at once, checked on the way."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from rpo_jax.errors import UserError
from rpo_jax.weights.names import Tensor
from rpo_jax.weights.shards import ITEM_BYTES
from rpo_jax.weights.store import cut_pieces
from rpo_jax.writing import in_bucket

# What Python with JAX and TensorStore holds before the first piece, measured with room to spare.
_BASE_BYTES = 512 * 2**20
# Copies of a piece that may be in memory at once: read, cast, and TensorStore's own.
_COPIES = 5
_BLOCK_BYTES = 2**19


def count_pieces(
    budget_gib: float, tensors: Iterable[Tensor], dtype: str, widest: str = "", extra: int = 0
) -> int:
    """How many pieces may be in memory at once.

    Args:
        budget_gib: GiB of anonymous memory for the whole process.
        tensors: what is to be moved.
        dtype: the dtype in which they lie in the checkpoint.
        widest: the dtype they become on the way, if it is a wider one.
        extra: bytes that reading one piece may need besides.

    Raises:
        UserError: the budget is too small for one.
    """
    kinds = {tensor.path: tensor for tensor in tensors}.values()
    largest = max(piece.elements for tensor in kinds for piece in cut_pieces(tensor, dtype))
    each = _COPIES * largest * ITEM_BYTES[widest or dtype] + extra
    fit = int((budget_gib * 2**30 - _BASE_BYTES) // each)
    if fit < 1:
        need = (_BASE_BYTES + each) / 2**30
        raise UserError(f"--ram_budget_gib={budget_gib} is too small: this model needs {need:.2f}")
    return fit


def count_threads(pieces: int) -> int:
    """How many to work with: a little more than there are cores, for one may wait for the disk."""
    return min(pieces, 1 + (os.cpu_count() or 1), 16)


def run_all(
    work: Callable[[Any, Callable[[int], None]], object],
    items: Sequence[Any],
    threads: int,
    progress: tqdm,
) -> None:
    """Calls `work(item, advance)` for all items; `advance(bytes)` moves the bar.

    The first error, or Ctrl-C, stops the others at their next `advance`.
    """
    stop = threading.Event()

    def advance(count: int) -> None:
        if stop.is_set():
            raise InterruptedError("another item failed, or the command was stopped")
        progress.update(count)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in as_completed([pool.submit(work, item, advance) for item in items]):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def read_ahead(read: Callable[[Any], Any], items: Iterable[Any], count: int) -> Iterator[Any]:
    """Results of `read` in the order of `items`; at most `count` are begun and not yet taken."""
    with ThreadPoolExecutor(count) as pool:
        begun: deque[Future[Any]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(read, item))
                if len(begun) == count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


def cut_blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """The bits of an array, as unsigned integers of its width, in blocks that stay in a cache.

    Several passes over one block after the other read the memory once.
    """
    flat = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    step = _BLOCK_BYTES // values.dtype.itemsize
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def check_finite(block: np.ndarray, where: str) -> None:
    """Refuses NaN and infinity in a block of bf16 or float32 bits.

    Raises:
        UserError: says where.
    """
    # An exponent of all ones, compared as an integer: numpy has no arithmetic for bf16.
    magnitude, exponent = {2: (0x7FFF, 0x7F80), 4: (0x7FFFFFFF, 0x7F800000)}[block.itemsize]
    largest = (block & block.dtype.type(magnitude)).max()
    if largest >= exponent:
        raise UserError(f"{where}: holds {'NaN' if largest > exponent else 'infinity'}")


def check_space(target: epath.Path, wanted: int) -> None:
    """Refuses to begin what cannot fit on the disk of `target`.

    Raises:
        UserError: names both sizes.
    """
    if in_bucket(target):
        return
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if free < wanted:
        raise UserError(
            f"{target}: {wanted / 2**30:.2f} GiB are wanted, {free / 2**30:.2f} GiB are free "
            "on that disk; free some or choose another --target"
        )


def show_progress(what: str, total: int, done: int = 0) -> tqdm:
    """A bar in bytes, with rate and time left."""
    return tqdm(
        total=total, initial=done, desc=what, unit="B", unit_scale=True, mininterval=1.0, leave=True
    )


@contextlib.contextmanager
def write_steadily(path: epath.Path) -> Iterator[Callable[[Any], object]]:
    """Opens a large file for writing; it is on disk when the context ends without an error.

    A thread flushes it as it grows: the disk is busy while data are prepared, and little is left
    for the end.
    """
    with path.open("wb") as file:
        if in_bucket(path):
            yield file.write
            return
        with ThreadPoolExecutor(1) as pool:
            flushing = pool.submit(os.fsync, file.fileno())

            def write(data: Any) -> None:
                nonlocal flushing
                file.write(data)
                if flushing.done():
                    flushing.result()
                    flushing = pool.submit(os.fsync, file.fileno())

            yield write
            flushing.result()
        file.flush()
        os.fsync(file.fileno())
