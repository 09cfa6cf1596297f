"""Adapters in the format of PEFT, out and in, and merged into the weights on their way out.

PEFT stores an adapter as two matrices, `lora_A.weight` [R, inputs] and `lora_B.weight`
[outputs, R], which are ours transposed, heads and head_dim joined.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save

from rpo_jax.config import TARGETS, Lora
from rpo_jax.errors import UserError
from rpo_jax.model.quantize import count_inputs
from rpo_jax.model.shape import ModelShape
from rpo_jax.weights.names import Tensor, list_tensors
from rpo_jax.weights.shards import read_json, read_shard
from rpo_jax.weights.store import DTYPES, Piece
from rpo_jax.weights.workplace import (
    claim,
    find_workplace,
    give_name,
    hold,
    is_finished,
    list_other_files,
    refuse_other,
)
from rpo_jax.writing import write_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_NOTE = "base_checkpoint.json"  # ours: which checkpoint they were trained over

# Of what PEFT's LoRA can be told, that which changes the result and is not ours to follow: each
# with the values that leave it off.
_OFF = {
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layers_to_transform": (),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": (),
}


def _list_targets(shape: ModelShape) -> Iterator[tuple[Tensor, str, str]]:
    """Each adaptable tensor of a model, the name of its projection, its stem in PEFT's names."""
    for tensor in list_tensors(shape):
        room, _, name = tensor.path.removesuffix("/kernel").rpartition("/")
        if tensor.path.endswith("/kernel") and room.startswith("layers/"):
            yield tensor, name, f"base_model.model.{tensor.name.removesuffix('.weight')}"


def list_factors(
    pairs: dict[str, Any], lora: Lora, shape: ModelShape
) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """By the HF name of each adapted tensor: PEFT's stem, and views of A [R, in] and B [out, R].

    Args:
        pairs: our adapters of all layers, float32 on the host, as `init_adapters` lays them out.
        lora: rank and targets.
        shape: of the base.
    """
    found = {}
    for tensor, name, stem in _list_targets(shape):
        if name in lora.targets:
            _, room, _, _ = tensor.path.split("/")
            a, b = (pairs[room][name][key][tensor.layer] for key in ("a", "b"))
            found[tensor.name] = (stem, a.reshape(-1, lora.rank).T, b.reshape(lora.rank, -1).T)
    return found


@dataclass(frozen=True)
class MergedArrays:
    """`store.Arrays` with adapters merged into what is read, in float32.

    Attributes:
        base: the arrays of the base; adapters may be merged into these in turn.
        factors: see `list_factors`.
        scale: alpha / R.
        rows: by path of a table, ids and the trained rows that stand in for its own.
    """

    base: Any
    factors: dict[str, tuple[str, np.ndarray, np.ndarray]]
    scale: float
    rows: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def dtype(self) -> str:
        """Of the base."""
        return self.base.dtype

    def chunk_steps(self, tensor: Tensor) -> int:
        """As of the base."""
        return self.base.chunk_steps(tensor)

    def largest_chunk(self) -> int:
        """As of the base."""
        return self.base.largest_chunk()

    def read(self, piece: Piece) -> np.ndarray:
        """The HF rows of a piece."""
        rows = self.base.read(piece)
        if piece.tensor.path in self.rows:
            ids, trained = self.rows[piece.tensor.path]
            here = (ids >= piece.start) & (ids < piece.stop)
            rows = rows.copy()
            rows[ids[here] - piece.start] = trained[here]
        if piece.tensor.name not in self.factors:
            return rows
        _, a, b = self.factors[piece.tensor.name]
        each = piece.tensor.rows_each
        change = b[piece.start * each : piece.stop * each] @ a
        return (rows.astype(np.float32) + np.float32(self.scale) * change).astype(rows.dtype)


def write_peft(
    target: epath.Path,
    pairs: dict[str, Any],
    lora: Lora,
    shape: ModelShape,
    base: str,
    papers: dict[str, bytes],
) -> None:
    """Writes adapters as a folder that PEFT loads.

    Args:
        target: a new folder, there once it is whole; left alone if it holds these already.
        pairs: our adapters of all layers, float32 on the host, as `init_adapters` lays them out.
        lora: rank, alpha and targets.
        shape: of the base.
        base: hub id or path of the base model, for PEFT to find it; or `none`.
        papers: what goes beside them by name, such as the model card.

    Raises:
        UserError: the target is something else, or unfinished work on something else does.
    """
    tensors, modules = {}, set()
    for stem, a, b in list_factors(pairs, lora, shape).values():
        tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b)
        modules.add(stem.rpartition(".")[2])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base == "none" else base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    files = papers | {
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    if is_finished(target, files):
        refuse_other(target, list_other_files(target, files))
        return
    folder = find_workplace(target)
    claim(folder, {"adapters": {name: sha256(data).hexdigest() for name, data in files.items()}})
    with hold(folder, alone=True, wait=False) as held:
        if not held:
            raise UserError(f"{folder}: another process is at work there")
        for name, data in files.items():
            write_whole(folder / name, data)
        give_name(folder, target)


def note_base(name: str, step: int, checkpoint: str) -> bytes:
    """The note beside exported adapters, of the checkpoint that they were trained over."""
    note = {"base": name, "step": step, "checkpoint": checkpoint}
    return (json.dumps(note, ensure_ascii=False, indent=2) + "\n").encode()


def read_base_checkpoint(source: epath.Path) -> str:
    """Fingerprint of the checkpoint that an export's adapters were trained over; "": not told."""
    path = source / BASE_NOTE
    return str(read_json(path).get("checkpoint", "")) if path.exists() else ""


def read_peft(source: epath.Path, shape: ModelShape) -> tuple[Lora, dict[str, Any]]:
    """Reads a folder that PEFT saved.

    Returns:
        Rank, alpha, dropout and targets, and the adapters of all layers as float32, as
        `init_adapters` lays them out.

    Raises:
        UserError: it is no LoRA, one of a kind that we do not compute, or one of another model;
            names the setting or the tensor.
    """
    lora = _read_config(source)
    path = source / WEIGHTS
    if not path.exists():
        raise UserError(f"{path}: not there; a folder saved by PEFT as safetensors is wanted")
    entries = {entry.name: entry for entry in read_shard(path).entries}
    data, rank = path.read_bytes(), lora.rank

    def take(name: str, stored_shape: tuple[int, int]) -> np.ndarray:
        entry = entries.pop(name, None)
        if entry is None:
            raise UserError(f"{path}: {name}: missing")
        if entry.shape != stored_shape:
            raise UserError(f"{path}: {name}: shape {entry.shape}, {stored_shape} is wanted")
        raw = np.frombuffer(data[entry.start : entry.end], DTYPES[entry.dtype])
        value = raw.reshape(stored_shape).T.astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name}: holds values that are not finite")
        return value

    pairs: dict[str, Any] = {}
    for tensor, name, stem in _list_targets(shape):
        if name not in lora.targets:
            continue
        cut = count_inputs(name)
        inputs, outputs = tensor.shape[:cut], tensor.shape[cut:]
        a = take(f"{stem}.lora_A.weight", (rank, math.prod(inputs)))
        b = take(f"{stem}.lora_B.weight", (math.prod(outputs), rank))
        room = pairs.setdefault(tensor.path.split("/")[1], {})
        layers = room.setdefault(name, {"a": [], "b": []})
        layers["a"].append(a.reshape(*inputs, rank))
        layers["b"].append(b.reshape(rank, *outputs))
    if entries:
        raise UserError(f"{path}: {min(entries)}: no adapter of this model has that tensor")
    return lora, {
        room: {
            name: {key: np.stack(layers) for key, layers in pair.items()}
            for name, pair in sorted(named.items())
        }
        for room, named in pairs.items()
    }


def _read_config(source: epath.Path) -> Lora:
    path = source / CONFIG
    if not path.exists():
        raise UserError(f"{path}: not there; a folder that PEFT saved is wanted")
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {values.get('peft_type')!r}, 'LORA' is wanted")
    for key, off in _OFF.items():
        if values.get(key) is not None and values[key] not in off:
            raise UserError(f"{path}: {key}={values[key]!r} is not supported")
    modules = values.get("target_modules")
    names = {"all-linear": list(TARGETS)}.get(str(modules), modules)
    if not isinstance(names, list):
        raise UserError(f"{path}: target_modules={modules!r}: a list of names is wanted")
    targets = {str(name).removesuffix("_proj") for name in names}
    if not targets or not targets <= set(TARGETS):
        raise UserError(
            f"{path}: target_modules={modules!r}: some of "
            f"{', '.join(f'{target}_proj' for target in TARGETS)} are wanted"
        )
    rank, alpha, dropout = (values.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise UserError(f"{path}: r={rank!r} and lora_alpha={alpha!r}: positive numbers are wanted")
    return Lora(
        rank=rank,
        alpha=float(alpha),
        dropout=float(dropout or 0.0),
        targets=tuple(target for target in TARGETS if target in targets),
    )
