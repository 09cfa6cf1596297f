"""Parameters on disk as Orbax lays them out, written and read by pieces through TensorStore.

A single Orbax save wants whole arrays in memory. So Orbax writes a checkpoint of the right tree
with placeholders for arrays, and TensorStore replaces each by an array of the real size, to be
filled piece by piece. That leans on how Orbax names arrays on disk; the round-trip tests stand
guard.

A piece is what a range of consecutive rows of one HF tensor becomes: one file (a zarr3 shard) of at
most `PIECE_BYTES`, made of chunks small enough that a host of a pod reads little more than its
part.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from rpo_jax.errors import UserError
from rpo_jax.weights.names import Tensor, from_hf
from rpo_jax.weights.shards import ITEM_BYTES, read_json
from rpo_jax.writing import in_bucket

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
PIECE_BYTES = 32 * 2**20
DTYPES: dict[str, np.dtype] = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
DTYPE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}

_PARAMS = "params"
# Most steps along each axis in one chunk. Meshes cut D finely (fsdp) and heads, F and V coarsely.
_CHUNK = {"D": 256, "N": 16, "K": 16, "F": 4096, "V": 4096, "H": 2**31}


@dataclass(frozen=True)
class Piece:
    """Steps `start` to `stop` of a tensor along its `row_axis`."""

    tensor: Tensor
    start: int
    stop: int

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of those rows."""
        return ((self.stop - self.start) * self.tensor.rows_each, *self.tensor.hf_shape[1:])

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.hf_shape)

    @property
    def place(self) -> tuple[Any, ...]:
        """The index into our array."""
        where: list[Any] = [slice(None)] * len(self.tensor.shape)
        where[self.tensor.row_axis] = slice(self.start, self.stop)
        return (*([] if self.tensor.layer is None else [self.tensor.layer]), *where)


def cut_pieces(tensor: Tensor, dtype: str, times: int = 1) -> Iterator[Piece]:
    """The pieces of a tensor, in the order of its rows; `times` as large as those of an import."""
    steps = tensor.shape[tensor.row_axis]
    each = min(steps, times * _piece_steps(tensor, dtype))
    for start in range(0, steps, each):
        yield Piece(tensor, start, min(start + each, steps))


def _piece_steps(tensor: Tensor, dtype: str) -> int:
    """Steps along the row axis in one piece: a multiple of those in one chunk, or all of them."""
    steps = tensor.shape[tensor.row_axis]
    if len(tensor.hf_shape) == 1:
        return steps
    row_bytes = tensor.rows_each * tensor.hf_shape[1] * ITEM_BYTES[dtype]
    return _part(steps, PIECE_BYTES // row_bytes)


def _part(size: int, most: int) -> int:
    """A number of at most `most` that divides `size`, or `most` if only small ones do."""
    most = max(1, min(size, most))
    divisor = next(n for n in range(most, 0, -1) if size % n == 0)
    return divisor if 4 * divisor > most else most


def create(folder: epath.Path, tensors: Sequence[Tensor], layers: int, dtype: str) -> None:
    """Makes step 0 of a model folder with arrays that are not yet filled."""
    placeholders: dict[str, Any] = {}
    for path in {tensor.path for tensor in tensors}:
        *parents, last = path.split("/")
        node = placeholders
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = np.zeros(1, DTYPES[dtype])
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = True
    root = folder / CHECKPOINTS
    root = root if in_bucket(root) else root.absolute()
    with _no_word_of_merging(), context, ocp.training.Checkpointer(root) as checkpoints:
        checkpoints.save_checkpointables(0, {_PARAMS: placeholders})
    step = folder / CHECKPOINTS / "0"
    for tensor in {tensor.path: tensor for tensor in tensors}.values():
        spec = _spec(step, tensor.path, use_ocdbt=False, use_zarr3=True)
        spec["metadata"] = _zarr_metadata(tensor, layers, dtype)
        ts.open(spec, create=True, delete_existing=True).result()


@contextlib.contextmanager
def _no_word_of_merging() -> Iterator[None]:
    """Keeps Orbax from warning that it finds no OCDBT files to merge; there are none here."""

    def is_other(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _zarr_metadata(tensor: Tensor, layers: int, dtype: str) -> dict[str, Any]:
    chunk = [
        _part(size, _CHUNK[axis]) for axis, size in zip(tensor.axes, tensor.shape, strict=True)
    ]
    row, steps = tensor.row_axis, _piece_steps(tensor, dtype)
    chunk[row] = _part(steps, _CHUNK[tensor.axes[row]])
    if steps % chunk[row]:
        chunk[row] = steps
    # A file is whole chunks, which on the other axes may reach beyond the array.
    file = [-(-size // each) * each for size, each in zip(tensor.shape, chunk, strict=True)]
    file[row] = steps
    stacked = tensor.layer is not None
    # The bytes of a chunk lie in HF's order, so that a conversion copies and need not transpose.
    order = [0, *(axis + 1 for axis in tensor.order)] if stacked else list(tensor.order)
    turn = {"name": "transpose", "configuration": {"order": order}}
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    codec = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1] * stacked + chunk,
            "codecs": [turn, plain],
            "index_codecs": [plain, {"name": "crc32c"}],
        },
    }
    return {
        "shape": [layers] * stacked + list(tensor.shape),
        "data_type": DTYPES[dtype].name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1] * stacked + file}},
        "codecs": [codec],
    }


def _spec(step: epath.Path, path: str, use_ocdbt: bool, use_zarr3: bool) -> dict[str, Any]:
    name = path.replace("/", ".")
    place: dict[str, Any] = _kvstore(step / _PARAMS / name)
    if use_ocdbt:
        place = {"driver": "ocdbt", "base": _kvstore(step / _PARAMS), "path": f"{name}/"}
    return {
        "driver": "zarr3" if use_zarr3 else "zarr",
        "kvstore": place,
        # As Orbax has it: zeros are written like any value, so that what is absent is missing.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _kvstore(path: epath.Path) -> dict[str, str]:
    if in_bucket(path):
        bucket, _, key = str(path).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
    return {"driver": "file", "path": f"{path.absolute()}/"}


@dataclass(frozen=True)
class Arrays:
    """The open arrays of one checkpoint, by path."""

    by_path: dict[str, Any]
    dtype: str

    def write(self, piece: Piece, rows: np.ndarray) -> None:
        """Writes the HF rows of a piece and waits until they are on disk."""
        try:
            # Nobody changes `rows` before the write ends, so TensorStore need not copy them.
            source = from_hf(rows, piece.tensor)
            target = self.by_path[piece.tensor.path][piece.place]
            target.write(source, can_reference_source_data_indefinitely=True).result()
        except (ValueError, OSError) as error:
            raise UserError(f"{piece.tensor.path}: cannot be written: {error}") from error

    def read(self, piece: Piece) -> np.ndarray:
        """The HF rows of a piece."""
        tensor = piece.tensor
        # Turned before it is read, so that TensorStore need not turn it in memory.
        turned = ts.d[tensor.order].transpose[:].translate_to[0]
        source = self.by_path[tensor.path][piece.place][turned]
        values = np.empty(source.shape, DTYPES[self.dtype])
        try:
            for part in _cut_slabs(source, tensor.order.index(tensor.row_axis)):
                values[part] = source[part].read().result()
        except (ValueError, OSError) as error:
            raise UserError(f"{tensor.path}: cannot be read, damaged on disk? {error}") from error
        return values.reshape(piece.hf_shape)

    def chunk_steps(self, tensor: Tensor) -> int:
        """Steps along the row axis of a tensor that are read where one of them is wanted."""
        layered = tensor.layer is not None
        return self.by_path[tensor.path].chunk_layout.read_chunk.shape[layered + tensor.row_axis]

    def largest_chunk(self) -> int:
        """Bytes that reading a single value may bring into memory."""
        shapes = [array.chunk_layout.read_chunk.shape for array in self.by_path.values()]
        return max(math.prod(shape) for shape in shapes) * ITEM_BYTES[self.dtype]


def _cut_slabs(source: Any, row: int) -> Iterator[tuple[slice, ...]]:
    """Parts of what is read that touch few chunks: TensorStore brings all into memory at once.

    They divide the axis along which most chunks lie, other than that of the rows.
    """
    chunk = source.chunk_layout.read_chunk.shape
    counts = [-(-size // each) for size, each in zip(source.shape, chunk, strict=True)]
    axis = max(set(range(source.ndim)) - {row}, key=counts.__getitem__, default=row)
    touched = math.prod(map(math.prod, zip(counts, chunk, strict=True)))
    most = 2 * PIECE_BYTES // (source.dtype.numpy_dtype.itemsize * touched // counts[axis])
    step = chunk[axis] * max(1, most)
    for start in range(0, source.shape[axis], step):
        yield (*[slice(None)] * axis, slice(start, min(start + step, source.shape[axis])))


def find_checkpoints(folder: epath.Path) -> epath.Path:
    """Where the checkpoints of a model folder lie: in it, or where the config of a run put them."""
    run = folder / RUN_FILE
    stored = read_json(run).get("config") if run.exists() else None
    directory = stored.get("checkpoint", {}).get("directory") if isinstance(stored, dict) else ""
    return place_checkpoints(folder, directory)


def place_checkpoints(folder: epath.Path, directory: str) -> epath.Path:
    """Where the checkpoints of a run go; see `checkpoint.directory` of its config."""
    if not directory:
        return folder / CHECKPOINTS
    root = epath.Path(directory)
    return (root if in_bucket(root) else root.resolve()) / folder.name


def open_arrays(step: epath.Path, tensors: Sequence[Tensor], layers: int) -> Arrays:
    """Opens the weights of one step, `<folder>/checkpoints/<step>`, however Orbax stored them.

    Raises:
        UserError: not a checkpoint of these tensors, or of a dtype other than bf16 and float32.
    """
    marker = step / _PARAMS / "_METADATA"
    if not marker.exists():
        raise UserError(f"{step}: no weights there (no {marker})")
    stored = read_json(marker)
    wanted = {tensor.path: tensor for tensor in tensors}
    try:
        nodes = stored["tree_metadata"].values()
        keys = {"/".join(key["key"] for key in node["key_metadata"]) for node in nodes}
        ocdbt, zarr3 = stored["use_ocdbt"], stored["use_zarr3"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{marker}: damaged ({type(error).__name__}: {error})") from error
    if keys != wanted.keys():
        raise UserError(f"{step}: has other arrays than the model: {sorted(keys ^ wanted.keys())}")

    def begin_open(path: str) -> Any:
        spec = _spec(step, path, ocdbt, zarr3)
        return ts.open(spec, open=True)

    try:
        opening = {path: begin_open(path) for path in wanted}
        arrays = {path: future.result() for path, future in opening.items()}
    except ValueError as error:
        raise UserError(f"{step}: cannot be read, damaged? {error}") from error
    dtypes = {array.dtype.name for array in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= DTYPE_NAMES.keys():
        raise UserError(
            f"{step}: weights are {sorted(dtypes)}; one of {sorted(DTYPE_NAMES)} is wanted"
        )
    for path, array in arrays.items():
        stacked = () if wanted[path].layer is None else (layers,)
        if array.shape != (*stacked, *wanted[path].shape):
            raise UserError(
                f"{step}: {path} is {array.shape}, the shape in model/config.json wants "
                f"{(*stacked, *wanted[path].shape)}"
            )
    return Arrays(arrays, DTYPE_NAMES[dtypes.pop()])
