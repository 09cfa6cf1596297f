"""Record sets: ArrayRecord files written and read through tensorflow-datasets, without TensorFlow.

A record set is a folder of shards with what tensorflow-datasets says about them (`features.json`,
`dataset_info.json`) and what we do (`dataset.json`: fingerprint, counts, ledger, provenance). It
appears complete, by one rename, or not at all.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from rpo_jax.errors import UserError
from rpo_jax.writing import draft_folder, in_bucket

Example = dict[str, Any]
Features = Mapping[str, Any]  # name -> feature of tensorflow-datasets

INFO_FILE = "dataset.json"
FORMAT = 3  # raised when the meaning of stored records changes: older sets are then made anew
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME, _SPLIT = "rpo", "records"
_DRAFT = ".shard-"  # what folders are called that a shard is written in
_LIBRARIES = ("tensorflow-datasets", "array-record", "numpy")


def text_features(row_length: int) -> Features:
    """A packed text row: what `packing.pack` yields."""
    # As numbers they would be taken out of the array one by one, which costs as much as a sixth of
    # tokenising them.
    row = tfds.features.Tensor(shape=(row_length,), dtype=np.int32, encoding="bytes")
    return {"tokens": row, "segment_ids": row, "documents": tfds.features.Text()}


def pair_features() -> Features:
    """A preference pair: ids without padding; both responses end in the end-of-text id."""
    ragged = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    return {
        "id": tfds.features.Text(),
        "prompt_ids": ragged,
        "chosen_ids": ragged,
        "rejected_ids": ragged,
    }


@dataclass(frozen=True)
class Records(Sequence[Any]):  # of Any: a check of types at run time would read a record
    """An opened record set: `records[i]` is a dict of int32 arrays and strings.

    Attributes:
        directory: where it lies.
        info: the content of `dataset.json`.
        source: the data source of tensorflow-datasets.
    """

    directory: Path
    info: Mapping[str, Any]
    source: Sequence[Any] = dataclasses.field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Identifies all that the records depend on: text, tokenizer, settings, format."""
        return str(self.info["fingerprint"])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        try:
            example = self.source[index]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.directory}: record {index} is damaged ({error})") from error
        return {k: v.decode() if isinstance(v, bytes) else v for k, v in example.items()}

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def digest(value: Any) -> str:
    """sha256 of plain nested data, independent of the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_records(
    directory: Path,
    features: Features,
    examples: Iterable[Example],
    describe: Callable[[], Mapping[str, Any]],
) -> Records:
    """Writes a record set of one shard, atomically: an exception on the way leaves nothing behind.

    Args:
        directory: the folder to create.
        features: of each example.
        examples: at least one; consumed once, as a stream.
        describe: called after the last example; what `dataset.json` shall say beside the counts, at
            least a `fingerprint`.
    """
    with draft_folder(directory) as draft:
        count = write_shard(draft / shard_name(0, 1), features, examples)
        seal_records(draft, features, [count], describe())
    return open_records(directory)


def shard_name(shard: int, shards: int) -> str:
    """The file of a shard, as tensorflow-datasets looks for it."""
    return f"{_NAME}-{_SPLIT}.array_record-{shard:05}-of-{shards:05}"


def write_shard(path: epath.PathLike, features: Features, examples: Iterable[Example]) -> int:
    """Writes the file of a shard, whole or not at all; the same examples are the same bytes.

    Args:
        path: of the file, which may lie in a bucket.
        features: of each example.
        examples: consumed as a stream.

    Returns:
        How many there were.
    """
    path = epath.Path(path)
    local = not in_bucket(path)
    schema = tfds.features.FeaturesDict(features)
    serializer = ExampleSerializer(schema.get_serialized_info())
    with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=path.parent if local else None) as room:
        scratch = Path(room) / path.name
        count = 0
        with _open_writer(scratch) as writer:
            for count, example in enumerate(examples, start=1):  # noqa: B007 (used after the loop)
                proto = serializer.get_tf_example(schema.encode_example(example))
                # Left to itself, protobuf orders fields by a number that each process draws.
                writer.write(proto.SerializeToString(deterministic=True))
        if local:
            scratch.replace(os.fspath(path))
        else:
            epath.Path(scratch).copy(path, overwrite=True)
    return count


@contextlib.contextmanager
def _open_writer(path: Path) -> Iterator[Any]:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        try:
            yield writer
        finally:
            writer.close()
    except RuntimeError as error:  # what the library makes of an OSError
        for code in FULL_DISK:
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code), str(path)) from error
        raise


def seal_records(
    scratch: Path, features: Features, counts: Sequence[int], info: Mapping[str, Any]
) -> None:
    """Makes a record set of a folder that holds all its shards.

    Args:
        scratch: the folder with the shards.
        features: of each example.
        counts: examples of each shard.
        info: what `dataset.json` shall say beside the counts, at least a `fingerprint`.
    """
    for left in scratch.glob(f"{_DRAFT}*"):  # by a process that was killed
        shutil.rmtree(left)
    names = [shard_name(shard, len(counts)) for shard in range(len(counts))]
    sizes = [(scratch / name).stat().st_size for name in names]
    shards = {
        name: {"bytes": size, "records": count}
        for name, size, count in zip(names, sizes, counts, strict=True)
    }
    split = tfds.core.SplitInfo(
        name=_SPLIT, shard_lengths=list(counts), num_bytes=sum(sizes), filename_template=None
    )
    tfds.folder_dataset.write_metadata(
        data_dir=scratch, features=features, split_infos=[split], check_data=False
    )
    content = {
        "format": FORMAT,
        "records": sum(counts),
        "shards": shards,
        "versions": {name: version(name) for name in _LIBRARIES},
        **info,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (scratch / INFO_FILE).write_text(text, encoding="utf-8")
    _check_shards(scratch, shards)


def open_records(directory: Path) -> Records:
    """Opens a record set and checks that all of it is there.

    Raises:
        UserError: it is missing or of an older format, or a shard is missing, truncated or holds
            another number of records than it should.
    """
    path = directory / INFO_FILE
    if not path.is_file():
        raise UserError(
            f"{directory}: no record set ({INFO_FILE} is missing); delete it all to prepare anew"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        found, shards = info["format"], info["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete {directory} to prepare anew") from error
    if found != FORMAT:
        raise UserError(
            f"{path}: format {found}, this version reads {FORMAT}; "
            f"delete {directory} to prepare anew"
        )
    _check_shards(directory, shards)
    try:
        source = tfds.builder_from_directory(directory).as_data_source(_SPLIT)
    except Exception as error:  # whatever tensorflow-datasets finds wrong with its own files
        raise UserError(f"{directory}: damaged ({error}); delete it to prepare anew") from error
    if len(source) != info["records"]:
        raise UserError(
            f"{directory}: dataset_info.json counts {len(source)} records, {INFO_FILE} "
            f"{info['records']}; delete it to prepare anew"
        )
    return Records(directory, info, source)


def _check_shards(directory: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    for name, wanted in shards.items():
        path = directory / name
        mend = f"; delete {directory} to prepare anew"
        if not path.is_file():
            raise UserError(f"{path}: shard is missing{mend}")
        if path.stat().st_size != wanted["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, {wanted['bytes']} were written{mend}"
            )
        try:
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            reader.close()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}){mend}") from error
        if count != wanted["records"]:
            raise UserError(f"{path}: {count} records, {wanted['records']} were written{mend}")
