"""The one table between the tensors of a Hugging Face Qwen2 checkpoint and our parameters."""

import math
from dataclasses import dataclass

import numpy as np

from rpo_jax.model.shape import ModelShape

# HF name, our path, HF axes, our axes. Letters are the shape alphabet; letters written together are
# one axis on the HF side. "{}" is the number of the layer, which on our side is a leading axis L.
_TABLE = (
    ("model.embed_tokens.weight", "embed/table", "V D", "V D"),
    ("model.layers.{}.input_layernorm.weight", "layers/attention_norm/scale", "D", "D"),
    ("model.layers.{}.self_attn.q_proj.weight", "layers/attention/q/kernel", "NH D", "D N H"),
    ("model.layers.{}.self_attn.q_proj.bias", "layers/attention/q/bias", "NH", "N H"),
    ("model.layers.{}.self_attn.k_proj.weight", "layers/attention/k/kernel", "KH D", "D K H"),
    ("model.layers.{}.self_attn.k_proj.bias", "layers/attention/k/bias", "KH", "K H"),
    ("model.layers.{}.self_attn.v_proj.weight", "layers/attention/v/kernel", "KH D", "D K H"),
    ("model.layers.{}.self_attn.v_proj.bias", "layers/attention/v/bias", "KH", "K H"),
    ("model.layers.{}.self_attn.o_proj.weight", "layers/attention/o/kernel", "D NH", "N H D"),
    ("model.layers.{}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "D", "D"),
    ("model.layers.{}.mlp.gate_proj.weight", "layers/mlp/gate/kernel", "F D", "D F"),
    ("model.layers.{}.mlp.up_proj.weight", "layers/mlp/up/kernel", "F D", "D F"),
    ("model.layers.{}.mlp.down_proj.weight", "layers/mlp/down/kernel", "D F", "F D"),
    ("model.norm.weight", "norm/scale", "D", "D"),
    ("lm_head.weight", "head/table", "V D", "V D"),
)


@dataclass(frozen=True)
class Tensor:
    """One HF tensor and the place of its values among our parameters.

    Attributes:
        name: the HF name.
        path: our parameter, "/" between keys.
        layer: index on the leading axis of the parameter; None if it has no layer axis.
        hf_shape: shape on the HF side.
        axes: letters of our axes, without the layer axis.
        shape: sizes of `axes`.
        row_axis: the one of `axes` that the rows (the first axis) of the HF side run along.
        rows_each: HF rows to a step along `row_axis`; more than 1 where rows are heads times H.
        order: our axes in the order in which the HF side has them.
    """

    name: str
    path: str
    layer: int | None
    hf_shape: tuple[int, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    row_axis: int
    rows_each: int
    order: tuple[int, ...]


def list_tensors(shape: ModelShape) -> list[Tensor]:
    """Every tensor of a model: embedding first, then layer by layer, head last."""
    sizes = {
        "V": shape.vocab_size,
        "D": shape.hidden_size,
        "F": shape.intermediate_size,
        "N": shape.num_attention_heads,
        "K": shape.num_key_value_heads,
        "H": shape.head_dim,
    }

    def make(row: tuple[str, str, str, str], layer: int | None) -> Tensor:
        name, path, hf_axes, ours = row
        rows, axes = hf_axes.split()[0], tuple(ours.split())
        return Tensor(
            name=name.format(layer),
            path=path,
            layer=layer,
            hf_shape=tuple(math.prod(sizes[a] for a in axis) for axis in hf_axes.split()),
            axes=axes,
            shape=tuple(sizes[axis] for axis in axes),
            row_axis=axes.index(rows[0]),
            rows_each=math.prod(sizes[axis] for axis in rows[1:]),
            order=tuple(axes.index(axis) for axis in hf_axes.replace(" ", "")),
        )

    layered = [row for row in _TABLE if "{}" in row[0]]
    embed, norm, head = (row for row in _TABLE if row not in layered)
    return [
        make(embed, None),
        *(make(row, layer) for layer in range(shape.num_hidden_layers) for row in layered),
        make(norm, None),
        *([] if shape.tie_word_embeddings else [make(head, None)]),
    ]


def from_hf(rows: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Rows of an HF tensor in our layout, all of them or a multiple of `rows_each`; a view."""
    split = [-1 if axis == tensor.row_axis else tensor.shape[axis] for axis in tensor.order]
    return rows.reshape(split).transpose(np.argsort(tensor.order))
