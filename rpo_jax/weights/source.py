"""A Hugging Face checkpoint, checked in full before any of it is used."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from etils import epath

from rpo_jax.errors import UserError
from rpo_jax.model.shape import ModelShape, parse_shape
from rpo_jax.weights.names import Tensor, list_tensors
from rpo_jax.weights.shards import INDEX, Entry, Shard, read_index, read_json, read_shard, stat_file
from rpo_jax.weights.workplace import refuse_unfinished

# What is kept beside the weights, byte for byte, and goes out again with an export.
KEPT_FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "LICENSE",
    "NOTICE",
)


@dataclass(frozen=True)
class Source:
    """A Qwen2 checkpoint in safetensors whose tensors are exactly those of its config.

    Attributes:
        directory: where its files are.
        name: what to call it: its hub id, or the folder.
        commit: of the hub; empty for a folder.
        shape: from its config.
        dtype: of every tensor.
        shards: its files of tensors.
        tensors: what is in them, in our order.
    """

    directory: epath.Path
    name: str
    commit: str
    shape: ModelShape
    dtype: str
    shards: tuple[Shard, ...]
    tensors: tuple[Tensor, ...]

    @cached_property
    def entries(self) -> dict[str, tuple[str, Entry]]:
        """File and place of each tensor."""
        return {entry.name: (shard.file, entry) for shard in self.shards for entry in shard.entries}


def fingerprint_files(source: Source) -> dict[str, str]:
    """What tells each file from another by that name, as far as can be told without reading it all.

    That is the commit of a file from the hub. Otherwise it is the header, size and time of change
    of a shard, and the content of a small file.
    """
    names = [shard.file for shard in source.shards]
    names += [name for name in KEPT_FILES if (source.directory / name).exists()]
    if source.commit:
        return dict.fromkeys(names, source.commit)
    headers = {shard.file: shard.header.encode() for shard in source.shards}

    def fingerprint(name: str) -> str:
        path = source.directory / name
        if name not in headers:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        size, changed = stat_file(path)
        return f"{hashlib.sha256(headers[name]).hexdigest()} {size} bytes, {changed}"

    return {name: fingerprint(name) for name in names}


def open_source(directory: epath.Path, hub_id: str = "") -> Source:
    """Reads config, index and headers, and checks every name, dtype and shape.

    Args:
        directory: a folder; if the hub's cache made it, it is named for the commit.
        hub_id: of what the hub's cache put there.

    Raises:
        UserError: not a Qwen2 checkpoint; a file or tensor is missing, extra, cut short or of
            another dtype or shape, all named.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder")
    refuse_unfinished(directory)
    shape = parse_shape(read_json(directory / "config.json"), str(directory / "config.json"))
    shards = []
    for file, promised in sorted(read_index(directory).items()):
        shard = read_shard(directory / file)
        held = {entry.name for entry in shard.entries}
        for name in sorted(promised ^ held if promised else ()):
            lacks = name in promised
            raise UserError(
                f"{directory / file}: {name} is {'missing' if lacks else 'there'}, "
                f"but {INDEX} says it is {'there' if lacks else 'elsewhere or nowhere'}"
            )
        shards.append(shard)
    tensors = _match(directory, shape, shards)
    dtype = next(entry.dtype for shard in shards for entry in shard.entries)
    name, commit = (hub_id, directory.name) if hub_id else (str(directory), "")
    return Source(directory, name, commit, shape, dtype, tuple(shards), tuple(tensors))


def _match(directory: epath.Path, shape: ModelShape, shards: list[Shard]) -> list[Tensor]:
    """The tensors of the shape, after comparing them with those in the files."""
    places: dict[str, tuple[str, Entry]] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in places:
                other = places[entry.name][0]
                raise UserError(f"{directory / shard.file}: {entry.name} is also in {other}")
            places[entry.name] = (shard.file, entry)
    if shape.num_hidden_layers > len(places):  # before making a list as long as a number in a file
        raise UserError(
            f"{directory}: config.json says {shape.num_hidden_layers} layers, but there are only "
            f"{len(places)} tensors"
        )
    tensors = list_tensors(shape)
    problems = [
        f"{directory}: {tensor.name} {tensor.hf_shape} is missing"
        for tensor in tensors
        if tensor.name not in places
    ]
    wanted = {tensor.name: tensor for tensor in tensors}
    dtype = Counter(entry.dtype for _, entry in places.values()).most_common(1)[0][0]
    for name, (file, entry) in places.items():
        where = f"{directory / file}: {name}"
        if name not in wanted:
            problems.append(f"{where}: not a tensor of this model; another architecture?")
        elif entry.shape != wanted[name].hf_shape:
            problems.append(
                f"{where}: shape {entry.shape}, config.json wants {wanted[name].hf_shape}"
            )
        elif entry.dtype != dtype:
            problems.append(f"{where}: dtype {entry.dtype}, most tensors are {dtype}")
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError("\n".join(problems[:10] + more))
    return tensors
