"""Record sets: ArrayRecord files written and read through tensorflow-datasets, without TensorFlow.

A record set is a folder of shards with what tensorflow-datasets says about them (`features.json`,
`dataset_info.json`) and what we do (`dataset.json`: fingerprint, counts, ledger, provenance). It
appears complete, by one rename, or not at all.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from rpo_jax.errors import UserError

Example = dict[str, Any]
Features = Mapping[str, Any]  # name -> feature of tensorflow-datasets

INFO_FILE = "dataset.json"
FORMAT = 1  # raised when the meaning of stored records changes: older sets are then made anew
_SPLIT = "records"
_LIBRARIES = ("tensorflow-datasets", "array-record", "numpy")


def text_features(row_length: int) -> Features:
    """A packed text row: what `packing.pack` yields."""
    row = tfds.features.Tensor(shape=(row_length,), dtype=np.int32)
    return {"tokens": row, "segment_ids": row}


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
class Records(Sequence[Example]):
    """An opened record set: `records[i]` is a dict of int32 arrays and strings.

    Attributes:
        directory: where it lies.
        info: the content of `dataset.json`.
        source: the data source of tensorflow-datasets.
    """

    directory: Path
    info: Mapping[str, Any]
    source: Sequence[Example] = dataclasses.field(repr=False)

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


class RecordSet(tfds.core.GeneratorBasedBuilder):
    """The builder: examples in the order given, in one split."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: Mapping[str, Any] = {}  # nothing is downloaded; looking for checksums would fail

    def __init__(self, features: Features, examples: Iterable[Example], data_dir: Path) -> None:
        self._features = features
        self._examples = examples
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Example]]]:
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Example]]:
        yield from enumerate(self._examples)


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
    """Writes a record set, atomically: an exception on the way leaves nothing behind.

    Args:
        directory: the folder to create.
        features: of each example.
        examples: at least one; consumed once, as a stream.
        describe: called after the last example; what `dataset.json` shall say beside the counts, at
            least a `fingerprint`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{directory.name}.incomplete-", dir=directory.parent))
    try:
        builder = RecordSet(features, examples, scratch)
        _build(builder)
        complete = Path(builder.data_path)
        shards = {
            shard.name: {"bytes": shard.stat().st_size, "records": count}
            for shard, count in zip(
                map(Path, builder.info.splits[_SPLIT].filepaths),
                builder.info.splits[_SPLIT].shard_lengths,
                strict=True,
            )
        }
        info = {
            "format": FORMAT,
            "records": sum(shard["records"] for shard in shards.values()),
            "shards": shards,
            "versions": {name: version(name) for name in _LIBRARIES},
            **describe(),
        }
        text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
        (complete / INFO_FILE).write_text(text, encoding="utf-8")
        _check_shards(complete, shards)
        try:
            complete.rename(directory)
        except OSError:
            if not (directory / INFO_FILE).is_file():
                raise  # else another process was faster with the same set
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_records(directory)


def open_records(directory: Path) -> Records:
    """Opens a record set and checks that all of it is there.

    Raises:
        UserError: it is missing or of an older format, or a shard is missing, truncated or holds
            another number of records than it should.
    """
    path = directory / INFO_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no record set ({INFO_FILE} is missing); run prepare")
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


def _build(builder: RecordSet) -> None:
    # tensorflow-datasets speaks of downloads; what is worth knowing our callers say.
    tfds.display_progress_bar(False)
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
