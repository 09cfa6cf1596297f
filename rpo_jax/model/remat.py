"""What of a layer is kept for the backward pass, and where; all else is computed again."""

from collections.abc import Callable
from typing import Any

import jax

from rpo_jax.model.blocks import OUTPUT
from rpo_jax.model.shape import ModelShape

INPUT = "input"  # of a layer; it is kept always

# By the names that are given to them. The product of `down` is asked for by nobody.
_KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": (OUTPUT,),
    "mlp": (OUTPUT, "q", "k", "v", "o"),
    "dots": (OUTPUT, "q", "k", "v", "o", "gate", "up"),
}
REMAT = tuple(_KEPT)  # policies of `model.remat`, from the one that keeps least on


def make_policy(remat: str, offload: bool) -> Callable[..., Any]:
    """The policy for `jax.checkpoint`; with `offload` what is kept waits in the host's memory."""
    if not offload:
        return jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT, *_KEPT[remat]],
        offload_src="device",
        offload_dst="pinned_host",
    )


def kept_width(shape: ModelShape, remat: str) -> int:
    """Numbers that all layers together keep for a token, beside their inputs."""
    heads = shape.num_attention_heads * shape.head_dim
    widths = {
        OUTPUT: heads,
        "q": heads,
        **dict.fromkeys(("k", "v"), shape.num_key_value_heads * shape.head_dim),
        **dict.fromkeys(("gate", "up"), shape.intermediate_size),
        "o": shape.hidden_size,
    }
    return sum(widths[name] for name in _KEPT[remat]) * shape.num_hidden_layers
