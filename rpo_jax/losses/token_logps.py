"""The one primitive: log-probabilities of given tokens under a large vocabulary.

Continued pretraining, DPO, NLL, the reference pass, the metrics and likelihood scoring all call
this one function, so that they cannot disagree.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Projection:
    """How hidden states meet the vocabulary; only `used_vocab` changes a result.

    Attributes:
        chunk: positions of each row whose logits are computed at a time, at least 1.
        keep_logits: keep the logits of all chunks for the backward pass (4 bytes a position and
            vocabulary row) rather than computing them again (a third more work). A head that is
            not trained needs neither.
        used_vocab: rows of the head from here on are no tokens and have probability 0; 0: all rows
            are tokens.
    """

    chunk: int
    keep_logits: bool = False
    used_vocab: int = 0


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logps(
    hidden_BMD: Float[Array, "B M D"],
    head_VD: Float[Array, "V D"],
    labels_BM: Int[Array, "B M"],
    how: Projection,
) -> Float[Array, "B M"]:
    """Log softmax(hidden @ head.T)[label], without ever holding all logits.

    With p the softmax of a position and e the unit vector of its label,

        d logp / d hidden = (e - p) @ head,    d logp / d head = (e - p) x hidden

    A chunk's logits are float32. The label's logit is picked by comparison with an iota rather than
    by a gather, so that a head cut over its vocabulary is never gathered. Where the head is not
    differentiated (it is frozen, as with adapters) its gradient is not computed, and that of the
    hidden state, but for a factor, is taken in the forward pass, while the logits are there.

    Args:
        hidden_BMD: states that predict the labels; their dtype is that of the matmul.
        head_VD: output head, cast to the dtype of `hidden_BMD`.
        labels_BM: token ids; at positions that are masked afterwards any id in range will do.
        how: memory against work, and which rows count.

    Returns:
        Log-probabilities in nats, float32.

    Source: ours; the chunked recomputation is the one of arXiv:2411.09009 over tokens.
    """
    head = head_VD.astype(hidden_BMD.dtype)

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        logits_BmV = _logits(part[0], head, how)
        return None, _pick(logits_BmV, part[1]) - jax.nn.logsumexp(logits_BmV, axis=-1)

    _, logps_CBm = jax.lax.scan(one, None, (_cut(hidden_BMD, how), _cut(labels_BM, how)))
    return _join(logps_CBm, labels_BM)


def _cut(x_BM: Array, how: Projection) -> Array:
    """[B, M, ...] to chunks [C, B, chunk, ...], the last one padded with zeros."""
    rows, length = x_BM.shape[:2]
    chunk = min(how.chunk, length)
    x_BM = jnp.pad(x_BM, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BM.ndim - 2))
    return x_BM.reshape(rows, -1, chunk, *x_BM.shape[2:]).swapaxes(0, 1)


def _join(x_CBm: Array, like_BM: Array) -> Array:
    """The inverse of `_cut`."""
    x_BCm = x_CBm.swapaxes(0, 1)
    return x_BCm.reshape(x_BCm.shape[0], -1, *x_BCm.shape[3:])[:, : like_BM.shape[1]]


def _logits(hidden_BmD: Array, head_VD: Array, how: Projection) -> Array:
    logits_BmV = jnp.einsum("bmd,vd->bmv", hidden_BmD, head_VD, preferred_element_type=jnp.float32)
    if not how.used_vocab:
        return logits_BmV
    return jnp.where(_ids(logits_BmV) < how.used_vocab, logits_BmV, -jnp.inf)


def _ids(logits_BmV: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits_BmV.shape, 2)


def _pick(logits_BmV: Array, labels_Bm: Array) -> Array:
    return jnp.sum(logits_BmV, axis=-1, where=_ids(logits_BmV) == labels_Bm[..., None])


def _slope(logits_BmV: Array, logz_Bm: Array, labels_Bm: Array) -> Array:
    """The derivative of the log-probability by the logits: e - p."""
    is_label = _ids(logits_BmV) == labels_Bm[..., None]
    return is_label - jnp.exp(logits_BmV - logz_Bm[..., None])


def _forward(hidden: Any, head: Any, labels: Any, how: Projection) -> tuple[Array, Any]:
    """The values, and what the backward pass needs."""
    hidden_BMD, head_VD, labels_BM = hidden.value, head.value, labels.value
    cast_head = head_VD.astype(hidden_BMD.dtype)

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Any]:
        hidden_BmD, labels_Bm = part
        logits_BmV = _logits(hidden_BmD, cast_head, how)
        logz_Bm = jax.nn.logsumexp(logits_BmV, axis=-1)
        logps_Bm = _pick(logits_BmV, labels_Bm) - logz_Bm
        if head.perturbed:
            return None, (logps_Bm, (logz_Bm, logits_BmV if how.keep_logits else None))
        slope_BmV = _slope(logits_BmV, logz_Bm, labels_Bm).astype(hidden_BmD.dtype)
        return None, (logps_Bm, jnp.einsum("bmv,vd->bmd", slope_BmV, cast_head))

    parts = (_cut(hidden_BMD, how), _cut(labels_BM, how))
    _, (logps_CBm, rest) = jax.lax.scan(one, None, parts)
    logps_BM = _join(logps_CBm, labels_BM)
    if head.perturbed:
        return logps_BM, (labels_BM, None, (hidden_BMD, head_VD, *rest))
    return logps_BM, (labels_BM, _join(rest, labels_BM), None)


def _backward(how: Projection, saved: Any, grad_BM: Array) -> tuple[Array, Array | None, Any]:
    labels_BM, slopes_BMD, trained = saved
    no_gradient = np.zeros(labels_BM.shape, jax.dtypes.float0)
    if trained is None:
        return (slopes_BMD * grad_BM[..., None]).astype(slopes_BMD.dtype), None, no_gradient
    hidden_BMD, head_VD, logz_CBm, logits_CBmV = trained
    cast_head = head_VD.astype(hidden_BMD.dtype)

    def one(head_grad_VD: Array, part: tuple[Any, ...]) -> tuple[Array, Array]:
        hidden_BmD, labels_Bm, grad_Bm, logz_Bm, logits_BmV = part
        if logits_BmV is None:
            logits_BmV = _logits(hidden_BmD, cast_head, how)
        wrong_BmV = grad_Bm[..., None] * _slope(logits_BmV, logz_Bm, labels_Bm)
        wrong_BmV = wrong_BmV.astype(hidden_BmD.dtype)
        head_grad_VD = head_grad_VD + jnp.einsum(
            "bmv,bmd->vd", wrong_BmV, hidden_BmD, preferred_element_type=jnp.float32
        )
        return head_grad_VD, jnp.einsum("bmv,vd->bmd", wrong_BmV, cast_head)

    cut = (_cut(x, how) for x in (hidden_BMD, labels_BM, grad_BM))
    zero_VD = jnp.zeros(head_VD.shape, jnp.float32)
    head_grad_VD, hidden_grad_CBmD = jax.lax.scan(one, zero_VD, (*cut, logz_CBm, logits_CBmV))
    hidden_grad_BMD = _join(hidden_grad_CBmD, labels_BM)
    return hidden_grad_BMD, head_grad_VD.astype(head_VD.dtype), no_gradient


token_logps.defvjp(_forward, _backward, symbolic_zeros=True)


def token_divergences(
    hidden_BMD: Float[Array, "B M D"],
    other_BMD: Float[Array, "B M D"],
    head_VD: Float[Array, "V D"],
    other_head_VD: Float[Array, "V D"],
    how: Projection,
) -> Float[Array, "B M"]:
    """KL(softmax(hidden @ head.T) || softmax(other @ other_head.T)) of each position, in nats.

    Float32, a chunk of positions at a time, as in `token_logps`; not meant to be differentiated.
    """
    head, other_head = head_VD.astype(hidden_BMD.dtype), other_head_VD.astype(other_BMD.dtype)

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        logps_BmV = jax.nn.log_softmax(_logits(part[0], head, how), axis=-1)
        other_BmV = jax.nn.log_softmax(_logits(part[1], other_head, how), axis=-1)
        # Rows that are no tokens have log-probability -inf on both sides, and no share.
        terms_BmV = jnp.where(logps_BmV == -jnp.inf, 0.0, logps_BmV - other_BmV)
        return None, jnp.sum(jnp.exp(logps_BmV) * terms_BmV, axis=-1)

    _, kl_CBm = jax.lax.scan(one, None, (_cut(hidden_BMD, how), _cut(other_BMD, how)))
    return _join(kl_CBm, hidden_BMD)
