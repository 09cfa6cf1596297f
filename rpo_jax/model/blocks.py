"""Attention block by block, in plain JAX: for processors that have no kernel for it."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

OUTPUT = "attention"  # under this name a rematerialisation policy may keep what is costly

_BLOCK = 128  # queries; their scores should fit the processor's cache

Masks = tuple[Bool[Array, "B _ _"], ...]  # of each block of queries, over the keys up to its end


def cut_mask(visible_BTS: Bool[Array, "B T S"]) -> Masks:
    """The part of a causal mask that each block of queries reads."""
    length = visible_BTS.shape[1]
    starts = range(0, length, _BLOCK)
    return tuple(visible_BTS[:, at : at + _BLOCK, : min(at + _BLOCK, length)] for at in starts)


def attend_blocks(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    masks: Masks,
) -> tuple[Float[Array, "B T N H"], None]:
    """What `attention.attend` gives under a causal mask; keys later than a block are never read.

    Scores and softmax are float32 and none of them is kept for the backward pass, which computes
    them again from the logarithm of the softmax's sum.

    Source: arXiv:2205.14135, over queries only.
    """
    rows, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTNH = q_BTNH * jnp.asarray(width**-0.5, q_BTNH.dtype)
    q_BTKGH = q_BTNH.reshape(rows, length, kv_heads, heads // kv_heads, width)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    y_BKGTH = _attend(q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), masks)
    return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape), None


@jax.custom_vjp
def _attend(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, masks: Masks) -> Array:
    return _forward(q_BKGTH, k_BKSH, v_BKSH, masks)[0]


def _cut(x: Array, masks: Masks, axis: int) -> list[Array]:
    """The queries of each block, or what belongs to them."""
    ends = [mask.shape[2] for mask in masks]
    return jnp.split(x, ends[:-1], axis)


def _scores(q_BKGtH: Array, k_BKSH: Array, mask_BtS: Array) -> Array:
    scores = jnp.einsum("bkgth,bksh->bkgts", q_BKGtH, k_BKSH, preferred_element_type=jnp.float32)
    return jnp.where(mask_BtS[:, None, None], scores, -jnp.inf)


def _forward(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, masks: Masks) -> tuple[Array, tuple]:
    parts, logz = [], []
    for q_BKGtH, mask_BtS in zip(_cut(q_BKGTH, masks, 3), masks, strict=True):
        end = mask_BtS.shape[2]
        scores = _scores(q_BKGtH, k_BKSH[:, :, :end], mask_BtS)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        y = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v_BKSH.dtype), v_BKSH[:, :, :end])
        parts.append((y / total).astype(v_BKSH.dtype))
        logz.append(top + jnp.log(total))
    y_BKGTH = checkpoint_name(jnp.concatenate(parts, axis=3), OUTPUT)
    logz_BKGT1 = checkpoint_name(jnp.concatenate(logz, axis=3), OUTPUT)
    return y_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, masks, y_BKGTH, logz_BKGT1)


def _backward(saved: tuple, grad_BKGTH: Array) -> tuple[Array, Array, Array, None]:
    q_BKGTH, k_BKSH, v_BKSH, masks, y_BKGTH, logz_BKGT1 = saved
    pull_BKGT1 = jnp.sum(
        grad_BKGTH.astype(jnp.float32) * y_BKGTH.astype(jnp.float32), axis=-1, keepdims=True
    )
    grads_q, grads_k, grads_v = [], [], []
    cut = (_cut(x, masks, 3) for x in (q_BKGTH, grad_BKGTH, logz_BKGT1, pull_BKGT1))
    for q, grad, logz, pull, mask_BtS in zip(*cut, masks, strict=True):
        end = mask_BtS.shape[2]
        k, v = k_BKSH[:, :, :end], v_BKSH[:, :, :end]
        weights = jnp.exp(_scores(q, k, mask_BtS) - logz)
        back = jnp.einsum("bkgth,bksh->bkgts", grad, v, preferred_element_type=jnp.float32)
        slope = (weights * (back - pull)).astype(k.dtype)
        weights = weights.astype(v.dtype)
        grads_q.append(jnp.einsum("bkgts,bksh->bkgth", slope, k))
        grads_k.append(jnp.einsum("bkgts,bkgth->bksh", slope, q))
        grads_v.append(jnp.einsum("bkgts,bkgth->bksh", weights, grad))
    return jnp.concatenate(grads_q, axis=3), _add(grads_k), _add(grads_v), None


def _add(parts_BKsH: list[Array]) -> Array:
    """The sum of what the blocks give for the keys up to their ends; the last has all of them."""
    length = parts_BKsH[-1].shape[2]
    pads = [[(0, 0), (0, 0), (0, length - part.shape[2]), (0, 0)] for part in parts_BKsH]
    return functools.reduce(jnp.add, map(jnp.pad, parts_BKsH, pads))


_attend.defvjp(_forward, _backward)
