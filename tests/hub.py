"""Checkpoints as the hub holds them, on random weights, written by the safetensors library."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tiny import SHAPE

from rpo_jax.model.shape import ModelShape, shape_to_hf
from rpo_jax.weights.names import list_tensors

TIED = replace(SHAPE, tie_word_embeddings=True, num_hidden_layers=2)
DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}
END_OF_TEXT = 7


def random_tensors(shape: ModelShape, dtype: str = "BF16", seed: int = 0) -> dict[str, np.ndarray]:
    """Every HF tensor of a shape."""
    rng = np.random.default_rng(seed)
    return {
        tensor.name: rng.normal(size=tensor.hf_shape).astype(DTYPES[dtype])
        for tensor in list_tensors(shape)
    }


def write_checkpoint(
    folder: Path,
    shape: ModelShape = SHAPE,
    dtype: str = "BF16",
    shards: int = 3,
    seed: int = 0,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A whole checkpoint: config, tokenizer, and one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(shape, dtype, seed) if tensors is None else tensors
    names = {"BF16": "bfloat16", "F32": "float32"}
    config: dict[str, Any] = {**shape_to_hf(shape), "torch_dtype": names[dtype]}
    # An odd layout, so that only copied bytes come out the same.
    (folder / "config.json").write_text(json.dumps(config, indent=3) + "\n\n")
    token = {"id": END_OF_TEXT, "content": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
    (folder / "tokenizer_config.json").write_text('{"é": 1}')
    (folder / "generation_config.json").write_text(f'{{"eos_token_id":  {END_OF_TEXT}}}')
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return folder
    weight_map = {}
    # The wrong way round, so that a shard does not hold what comes next in the table.
    names_by_shard = np.array_split(np.array(sorted(tensors, reverse=True)), shards)
    for number, held in enumerate(names_by_shard, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({str(name): tensors[str(name)] for name in held}, folder / file, metadata)
        weight_map |= {str(name): file for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
