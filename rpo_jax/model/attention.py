"""Who attends to whom, and the attention itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rpo_jax.model.blocks import attend_blocks, cut_mask
from rpo_jax.model.splash import splash_attend

# Queries, keys and values of a layer -> its output, and what a caller wants kept of it.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Angles a position, `[head_dim / 2]`, float32 on the host.

    The power is taken in float64 and rounded once, which is what a C library's float32 power gives;
    numpy's own float32 power depends on the processor (AVX-512 moves 14 of 64 entries by an ulp),
    and an all-float64 computation rounds elsewhere: each ulp is up to 2e-3 in the angle at position
    32k.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / powers


def rotate(
    x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], frequencies: np.ndarray
) -> Float[Array, "B T N H"]:
    """Rotary position embedding, halves paired as in Qwen2; computed in float32.

    Source: arXiv:2104.09864, in the half-rotation layout of GPT-NeoX.
    """
    angle_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def visible(
    segment_ids_BT: Int[Array, "B T"], branch_ids_BT: Int[Array, "B T"]
) -> Bool[Array, "B T T"]:
    """Which key each query sees, `[B, T query, S key]`.

    A token sees what is no later in the row, in its own segment, and on the trunk (branch 0) or its
    own branch. Documents are segments; the two responses of a pair are branches 1 and 2 of one
    segment, and so share a single copy of their prompt. Padding is segment 0: it sees only itself
    and earlier padding, so that no query is left without a key.
    """
    length = segment_ids_BT.shape[1]
    earlier_TS = jnp.tril(jnp.ones((length, length), bool))
    same_segment = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    key_branch = branch_ids_BT[:, None, :]
    on_path = (key_branch == 0) | (key_branch == branch_ids_BT[:, :, None])
    return earlier_TS & same_segment & on_path


def make_attend(
    implementation: str,
    segment_ids_BT: Int[Array, "B T"],
    branch_ids_BT: Int[Array, "B T"] | None,
    slots: tuple[int, ...] = (),
) -> Attend:
    """How queries meet keys in rows that are read whole, by `model.attention` of the config.

    Args:
        implementation: dense, blocks, splash or splash_interpreted.
        segment_ids_BT: as in `visible`.
        branch_ids_BT: as in `visible`; None: all tokens are on the trunk.
        slots: of prompt, chosen and rejected, where each row has its branches there: known before
            the row is, they cost splash nothing.
    """
    if implementation in ("dense", "blocks"):
        trunk_BT = jnp.zeros_like(segment_ids_BT)
        branch_ids_BT = trunk_BT if branch_ids_BT is None else branch_ids_BT
        visible_BTT = visible(segment_ids_BT, branch_ids_BT)
        if implementation == "dense":
            return partial(attend, visible_BTS=visible_BTT)
        return partial(attend_blocks, masks=cut_mask(visible_BTT))
    return partial(
        splash_attend,
        segment_ids_BT=segment_ids_BT,
        branch_ids_BT=branch_ids_BT,
        slots=slots,
        interpret=implementation == "splash_interpreted",
    )


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B T N H"], None]:
    """Grouped-query attention, scaled by 1/sqrt(H), logits and softmax float32; keeps nothing."""
    y_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None], implementation="xla"
    )
    return y_BTNH, None
