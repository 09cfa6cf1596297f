"""The one primitive: log-probabilities of given tokens under a large vocabulary.

Continued pretraining, DPO, NLL, the reference pass, the metrics and likelihood scoring all call
this one function, so that they cannot disagree.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logps(
    hidden_BMD: Float[Array, "B M D"],
    head_VD: Float[Array, "V D"],
    labels_BM: Int[Array, "B M"],
    chunk: int,
) -> Float[Array, "B M"]:
    """Log softmax(hidden @ head.T)[label], without ever holding all logits.

    Logits exist for `chunk` positions of each row at a time, in float32; the forward pass keeps
    only their logsumexp, and the backward pass computes them again. The label's logit is picked by
    comparison with an iota rather than by a gather, so that a head cut over its vocabulary is never
    gathered.

    Args:
        hidden_BMD: states that predict the labels; their dtype is that of the matmul.
        head_VD: output head, cast to the dtype of `hidden_BMD`.
        labels_BM: token ids; at positions that are masked afterwards any id in range will do.
        chunk: positions of each row a chunk, at least 1.

    Returns:
        Log-probabilities in nats, float32.

    Source: ours; the chunked recomputation is the one of arXiv:2411.09009 over tokens.
    """
    return _forward(hidden_BMD, head_VD, labels_BM, chunk)[0]


def _cut(x_BM: Array, chunk: int) -> Array:
    """[B, M, ...] to chunks [C, B, chunk, ...], the last one padded with zeros."""
    rows, length = x_BM.shape[:2]
    pad = -length % chunk
    x_BM = jnp.pad(x_BM, [(0, 0), (0, pad)] + [(0, 0)] * (x_BM.ndim - 2))
    return x_BM.reshape(rows, -1, chunk, *x_BM.shape[2:]).swapaxes(0, 1)


def _join(x_CBm: Array, length: int) -> Array:
    """The inverse of `_cut`."""
    x_BCm = x_CBm.swapaxes(0, 1)
    return x_BCm.reshape(x_BCm.shape[0], -1, *x_BCm.shape[3:])[:, :length]


def _logits(hidden_BmD: Array, head_VD: Array) -> Array:
    return jnp.einsum("bmd,vd->bmv", hidden_BmD, head_VD, preferred_element_type=jnp.float32)


def _is_label(logits_BmV: Array, labels_Bm: Array) -> Array:
    ids = jax.lax.broadcasted_iota(jnp.int32, logits_BmV.shape, 2)
    return ids == labels_Bm[..., None]


def _forward(hidden_BMD: Array, head_VD: Array, labels_BM: Array, chunk: int) -> tuple[Any, Any]:
    length = labels_BM.shape[1]
    chunk = min(chunk, length)
    head = head_VD.astype(hidden_BMD.dtype)

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        hidden_BmD, labels_Bm = part
        logits_BmV = _logits(hidden_BmD, head)
        logz_Bm = jax.nn.logsumexp(logits_BmV, axis=-1)
        label_Bm = jnp.sum(logits_BmV, axis=-1, where=_is_label(logits_BmV, labels_Bm))
        return None, (label_Bm - logz_Bm, logz_Bm)

    _, (logps, logz) = jax.lax.scan(one, None, (_cut(hidden_BMD, chunk), _cut(labels_BM, chunk)))
    return _join(logps, length), (hidden_BMD, head_VD, labels_BM, _join(logz, length))


def _backward(chunk: int, saved: Any, grad_BM: Array) -> tuple[Array, Array, Any]:
    hidden_BMD, head_VD, labels_BM, logz_BM = saved
    length = labels_BM.shape[1]
    chunk = min(chunk, length)
    head = head_VD.astype(hidden_BMD.dtype)

    def one(head_grad_VD: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden_BmD, labels_Bm, logz_Bm, grad_Bm = part
        logits_BmV = _logits(hidden_BmD, head)
        probs_BmV = jnp.exp(logits_BmV - logz_Bm[..., None])
        wrong_BmV = grad_Bm[..., None] * (_is_label(logits_BmV, labels_Bm) - probs_BmV)
        wrong_BmV = wrong_BmV.astype(hidden_BmD.dtype)
        head_grad_VD = head_grad_VD + jnp.einsum(
            "bmv,bmd->vd", wrong_BmV, hidden_BmD, preferred_element_type=jnp.float32
        )
        return head_grad_VD, jnp.einsum("bmv,vd->bmd", wrong_BmV, head)

    parts = tuple(_cut(x, chunk) for x in (hidden_BMD, labels_BM, logz_BM, grad_BM))
    head_grad_VD, hidden_grad = jax.lax.scan(one, jnp.zeros(head_VD.shape, jnp.float32), parts)
    no_gradient = np.zeros(labels_BM.shape, jax.dtypes.float0)
    return _join(hidden_grad, length), head_grad_VD.astype(head_VD.dtype), no_gradient


token_logps.defvjp(_forward, _backward)
