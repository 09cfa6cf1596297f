"""The log-prob primitive against float64, by value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from rpo_jax.losses.token_logps import Projection, token_divergences, token_logps

B, M, D, V = 2, 7, 8, 37


def _inputs(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = scale * rng.normal(size=(B, M, D))
    head = rng.normal(size=(V, D))
    labels = rng.integers(0, V, (B, M))
    return hidden.astype(np.float32), head.astype(np.float32), labels.astype(np.int32)


def _oracle(hidden, head, labels):
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T
    top = logits.max(-1, keepdims=True)
    logz = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    logps = logits - logz
    return np.take_along_axis(logps, labels[..., None], -1)[..., 0], np.exp(logps)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values_are_those_of_float64(chunk, scale):
    hidden, head, labels = _inputs(scale=scale)
    found = jax.jit(token_logps, static_argnums=3)(hidden, head, labels, Projection(chunk))
    wanted, _ = _oracle(hidden, head, labels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-5 if scale > 1 else 1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_gradients_are_those_of_float64(chunk, keep_logits):
    how = Projection(chunk, keep_logits)
    hidden, head, labels = _inputs()
    weight = np.random.default_rng(1).normal(size=(B, M)).astype(np.float32)
    weight[0, 2] = 0.0  # a masked token

    def total(hidden, head):
        return jnp.sum(weight * token_logps(hidden, head, jnp.asarray(labels), how))

    hidden_grad, head_grad = jax.jit(jax.grad(total, (0, 1)))(hidden, head)
    _, probs = _oracle(hidden, head, labels)
    wrong = weight[..., None] * (np.eye(V)[labels] - probs)
    np.testing.assert_allclose(hidden_grad, wrong @ head, rtol=1e-5, atol=1e-5)
    wanted = np.einsum("bmv,bmd->vd", wrong, hidden)
    np.testing.assert_allclose(head_grad, wanted, rtol=1e-5, atol=1e-5)
    assert not np.asarray(hidden_grad)[0, 2].any()


@pytest.mark.parametrize("keep_logits", [False, True])
def test_a_frozen_head_gives_the_same_gradient_of_the_states(keep_logits):
    hidden, head, labels = map(jnp.asarray, _inputs())
    weight = np.random.default_rng(1).normal(size=(B, M)).astype(np.float32)

    def total(hidden, head):
        return jnp.sum(weight * token_logps(hidden, head, labels, Projection(3, keep_logits)))

    both, _ = jax.jit(jax.grad(total, (0, 1)))(hidden, head)
    alone = jax.jit(jax.grad(total))(hidden, head)
    np.testing.assert_allclose(alone, both, rtol=1e-5, atol=1e-6)


def test_rows_that_are_no_tokens_have_no_probability():
    hidden, head, labels = map(jnp.asarray, _inputs())
    used = 30
    labels = labels % used
    how = Projection(3, used_vocab=used)
    found = jax.jit(token_logps, static_argnums=3)(hidden, head, labels, how)
    wanted, _ = _oracle(*map(np.asarray, (hidden, head[:used], labels)))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda head: token_logps(hidden, head, labels, how).sum()))(head)
    assert np.isfinite(gradient).all()
    assert np.asarray(gradient)[:used].any(-1).all() and not np.asarray(gradient)[used:].any()


VOCAB = 152064  # Qwen2.5 from 7B up


def _temporary_bytes(logps, trains_head, length=512, width=64):
    """Memory of a compiled gradient of one row beyond its arguments and results."""
    rows = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    head = jax.ShapeDtypeStruct((VOCAB, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, length), jnp.int32)
    gradient = jax.grad(lambda *args: logps(*args).sum(), (0, 1) if trains_head else 0)
    compiled = jax.jit(gradient).lower(rows, head, labels).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _naive(hidden, head, labels):
    logps = jax.nn.log_softmax(jnp.einsum("bmd,vd->bmv", hidden, head))
    return jnp.take_along_axis(logps, labels[..., None], axis=-1)


def test_memory_does_not_grow_with_vocabulary_times_length():
    chunk, length, logit_row = 32, 512, 4 * VOCAB

    def chunked(*args):
        return token_logps(*args, Projection(chunk))

    def kept(*args):
        return token_logps(*args, Projection(chunk, keep_logits=True))

    assert _temporary_bytes(_naive, True) >= length * logit_row
    assert _temporary_bytes(kept, True) >= length * logit_row
    head_grad = 64 * logit_row
    assert _temporary_bytes(chunked, True) < 3 * chunk * logit_row + head_grad
    assert _temporary_bytes(chunked, False) < 3 * chunk * logit_row
    assert _temporary_bytes(kept, False) < 3 * chunk * logit_row


def test_bfloat16_states_keep_float32_log_probs():
    hidden, head, labels = _inputs()
    found = jax.jit(token_logps, static_argnums=3)(
        jnp.bfloat16(hidden), head, labels, Projection(3)
    )
    rounded = (
        np.asarray(jnp.bfloat16(hidden), np.float32),
        np.asarray(jnp.bfloat16(head), np.float32),
    )
    wanted, _ = _oracle(*rounded, labels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_divergences_are_those_of_whole_distributions():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, other = (jax.random.normal(key, (2, 7, 16)) for key in keys[:2])
    head, other_head = (jax.random.normal(key, (33, 16)) for key in keys[2:])
    how = Projection(3, used_vocab=30)
    found = token_divergences(hidden, other, head, other_head, how)
    logits = (np.asarray(x)[..., :30] for x in (hidden @ head.T, other @ other_head.T))
    p, q = (log_softmax(x.astype(np.float64), axis=-1) for x in logits)
    np.testing.assert_allclose(found, np.sum(np.exp(p) * (p - q), axis=-1), rtol=1e-4)
    assert np.all(np.abs(token_divergences(hidden, hidden, head, head, how)) < 1e-6)
