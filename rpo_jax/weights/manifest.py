"""What an import remembers, so that an export can be byte-identical and damage be found."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass

from etils import epath

from rpo_jax.errors import UserError
from rpo_jax.weights.shards import Shard, check_plain_name, parse_header, read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The record of an import.

    Attributes:
        source: where it came from: a hub id, or a folder.
        commit: of the hub; empty for a folder.
        files: what told its files from others of those names, see `fingerprint_files`.
        checkpoint: fingerprint of the step that the checksums are of, see `fingerprint_step`.
        shards: the files, with their headers as they were.
        sums: SHA-256 of the bytes of each tensor.
    """

    source: str
    commit: str
    files: dict[str, str]
    checkpoint: str
    shards: tuple[Shard, ...]
    sums: dict[str, str]


def fingerprint_step(step: epath.Path) -> str:
    """Tells one written checkpoint from another: Orbax notes when it was begun."""
    return hashlib.sha256((step / "_CHECKPOINT_METADATA").read_bytes()).hexdigest()


def dump_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON."""
    values = {
        "source": manifest.source,
        "commit": manifest.commit,
        "files": manifest.files,
        "checkpoint": manifest.checkpoint,
        "shards": [{"file": shard.file, "header": shard.header} for shard in manifest.shards],
        "tensors": {
            entry.name: {
                "file": shard.file,
                "dtype": entry.dtype,
                "shape": entry.shape,
                "sha256": manifest.sums[entry.name],
            }
            for shard in manifest.shards
            for entry in shard.entries
        },
    }
    return (json.dumps(values, indent=1) + "\n").encode()


def read_manifest(folder: epath.Path, tensors: Collection[str] | None = None) -> Manifest | None:
    """The manifest of a model folder; None if it was not imported.

    Raises:
        UserError: damaged, or not of these tensors.
    """
    path = folder / "model" / MANIFEST
    if not path.exists():
        return None
    values = read_json(path)
    try:
        shards = []
        for shard in values["shards"]:
            check_plain_name(shard["file"], str(path))
            shards.append(parse_header(shard["header"].encode(), str(path), shard["file"]))
        sums = {name: tensor["sha256"] for name, tensor in values["tensors"].items()}
        manifest = Manifest(
            source=str(values["source"]),
            commit=str(values["commit"]),
            files={name: str(mark) for name, mark in values["files"].items()},
            checkpoint=str(values["checkpoint"]),
            shards=tuple(shards),
            sums=sums,
        )
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); import again"
        ) from error
    held = [entry.name for shard in manifest.shards for entry in shard.entries]
    if sorted(held) != sorted(sums) or (tensors is not None and set(held) != set(tensors)):
        raise UserError(f"{path}: lists other tensors than model/config.json; import again")
    return manifest
