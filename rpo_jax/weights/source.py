"""A Hugging Face checkpoint, checked in full before any of it is used."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from etils import epath

from rpo_jax.errors import UserError
from rpo_jax.model.shape import ModelShape, parse_shape
from rpo_jax.weights.names import Tensor, list_tensors
from rpo_jax.weights.shards import INDEX, Entry, Shard, read_index, read_json, read_shard

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
    """A Qwen2 checkpoint in safetensors whose tensors are exactly those of its config."""

    directory: epath.Path
    shape: ModelShape
    dtype: str
    shards: tuple[Shard, ...]
    tensors: tuple[Tensor, ...]

    @cached_property
    def entries(self) -> dict[str, tuple[str, Entry]]:
        """File and place of each tensor."""
        return {entry.name: (shard.file, entry) for shard in self.shards for entry in shard.entries}

    @cached_property
    def digest(self) -> str:
        """Identity of the layout: config and headers, not the values."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for shard in self.shards:
            digest.update(f"\n{shard.file}\n{shard.header}".encode())
        return digest.hexdigest()


def open_source(directory: epath.Path) -> Source:
    """Reads config, index and headers, and checks every name, dtype and shape.

    Raises:
        UserError: not a Qwen2 checkpoint; a file or tensor is missing, extra, cut short or of
            another dtype or shape, all named.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder")
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
    return Source(directory, shape, dtype, tuple(shards), tuple(tensors))


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
