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

    A chunk's logits are float32, those of all its rows one matrix. Of a head that is cut over its
    vocabulary neither rows nor logits are gathered: each device has the label's logit or has not,
    and numbers, one a position, are added up. Where the head is not
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
        logits_mV = _logits(part[0], head, how)
        return None, _pick(logits_mV, part[1]) - jax.nn.logsumexp(logits_mV, axis=-1)

    _, logps_Cm = jax.lax.scan(one, None, (_cut(hidden_BMD, how), _cut(labels_BM, how)))
    return _join(logps_Cm, labels_BM)


def _cut(x_BM: Array, how: Projection) -> Array:
    """[B, M, ...] to chunks [C, m, ...] of the same positions of all rows, m = B times `how.chunk`.

    The last one is padded with zeros. One axis rather than two: with two, XLA on CPU would turn
    whole matrices before it contracts over them.
    """
    rows, length = x_BM.shape[:2]
    chunk = min(how.chunk, length)
    x_BM = jnp.pad(x_BM, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BM.ndim - 2))
    x_CBm = x_BM.reshape(rows, -1, chunk, *x_BM.shape[2:]).swapaxes(0, 1)
    return x_CBm.reshape(x_CBm.shape[0], -1, *x_BM.shape[2:])


def _join(x_Cm: Array, like_BM: Array) -> Array:
    """The inverse of `_cut`."""
    rows, length = like_BM.shape[:2]
    x_BCm = x_Cm.reshape(x_Cm.shape[0], rows, -1, *x_Cm.shape[2:]).swapaxes(0, 1)
    return x_BCm.reshape(rows, -1, *x_Cm.shape[2:])[:, :length]


def _logits(hidden_mD: Array, head_VD: Array, how: Projection) -> Array:
    logits_mV = jnp.einsum("md,vd->mv", hidden_mD, head_VD, preferred_element_type=jnp.float32)
    if not how.used_vocab:
        return logits_mV
    return jnp.where(_ids(logits_mV) < how.used_vocab, logits_mV, -jnp.inf)


def _ids(logits_mV: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits_mV.shape, 1)


def _pick(logits_mV: Array, labels_m: Array) -> Array:
    """The labels' logits: by comparison with an iota, which XLA fuses with the sum but on CPU."""

    def compare(logits_mV: Array, labels_m: Array) -> Array:
        return jnp.sum(logits_mV, axis=-1, where=_ids(logits_mV) == labels_m[:, None])

    def take(logits_mV: Array, labels_m: Array) -> Array:
        picked_m1 = jnp.take_along_axis(logits_mV, labels_m[:, None], 1, mode="promise_in_bounds")
        return picked_m1[:, 0]

    return jax.lax.platform_dependent(logits_mV, labels_m, cpu=take, default=compare)


def _slope(logits_mV: Array, logz_m: Array, labels_m: Array) -> Array:
    """The derivative of the log-probability by the logits: e - p."""
    is_label = _ids(logits_mV) == labels_m[:, None]
    return is_label - jnp.exp(logits_mV - logz_m[:, None])


def _forward(hidden: Any, head: Any, labels: Any, how: Projection) -> tuple[Array, Any]:
    """The values, and what the backward pass needs."""
    hidden_BMD, head_VD, labels_BM = hidden.value, head.value, labels.value
    cast_head = head_VD.astype(hidden_BMD.dtype)

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Any]:
        hidden_mD, labels_m = part
        logits_mV = _logits(hidden_mD, cast_head, how)
        logz_m = jax.nn.logsumexp(logits_mV, axis=-1)
        logps_m = _pick(logits_mV, labels_m) - logz_m
        if head.perturbed:
            return None, (logps_m, (logz_m, logits_mV if how.keep_logits else None))
        slope_mV = _slope(logits_mV, logz_m, labels_m).astype(hidden_mD.dtype)
        return None, (logps_m, jnp.einsum("mv,vd->md", slope_mV, cast_head))

    parts = (_cut(hidden_BMD, how), _cut(labels_BM, how))
    _, (logps_Cm, rest) = jax.lax.scan(one, None, parts)
    logps_BM = _join(logps_Cm, labels_BM)
    if head.perturbed:
        return logps_BM, (labels_BM, None, (hidden_BMD, head_VD, *rest))
    return logps_BM, (labels_BM, _join(rest, labels_BM), None)


def _backward(how: Projection, saved: Any, grad_BM: Array) -> tuple[Array, Array | None, Any]:
    labels_BM, slopes_BMD, trained = saved
    no_gradient = np.zeros(labels_BM.shape, jax.dtypes.float0)
    if trained is None:
        return (slopes_BMD * grad_BM[..., None]).astype(slopes_BMD.dtype), None, no_gradient
    hidden_BMD, head_VD, logz_Cm, logits_CmV = trained
    cast_head = head_VD.astype(hidden_BMD.dtype)

    def one(head_grad_VD: Array, part: tuple[Any, ...]) -> tuple[Array, Array]:
        hidden_mD, labels_m, grad_m, logz_m, logits_mV = part
        if logits_mV is None:
            logits_mV = _logits(hidden_mD, cast_head, how)
        wrong_mV = grad_m[:, None] * _slope(logits_mV, logz_m, labels_m)
        wrong_mV = wrong_mV.astype(hidden_mD.dtype)
        head_grad_VD = head_grad_VD + jnp.einsum(
            "mv,md->vd", wrong_mV, hidden_mD, preferred_element_type=jnp.float32
        )
        return head_grad_VD, jnp.einsum("mv,vd->md", wrong_mV, cast_head)

    cut = (_cut(x, how) for x in (hidden_BMD, labels_BM, grad_BM))
    zero_VD = jnp.zeros(head_VD.shape, jnp.float32)
    head_grad_VD, hidden_grad_CmD = jax.lax.scan(one, zero_VD, (*cut, logz_Cm, logits_CmV))
    hidden_grad_BMD = _join(hidden_grad_CmD, labels_BM)
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
        logps_mV = jax.nn.log_softmax(_logits(part[0], head, how), axis=-1)
        other_mV = jax.nn.log_softmax(_logits(part[1], other_head, how), axis=-1)
        # Rows that are no tokens have log-probability -inf on both sides, and no share.
        terms_mV = jnp.where(logps_mV == -jnp.inf, 0.0, logps_mV - other_mV)
        return None, jnp.sum(jnp.exp(logps_mV) * terms_mV, axis=-1)

    _, kl_Cm = jax.lax.scan(one, None, (_cut(hidden_BMD, how), _cut(other_BMD, how)))
    return _join(kl_Cm, hidden_BMD)
