"""The log-prob primitive against float64, by value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.losses.token_logps import token_logps

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
    found = jax.jit(token_logps, static_argnums=3)(hidden, head, labels, chunk)
    wanted, _ = _oracle(hidden, head, labels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-5 if scale > 1 else 1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_gradients_are_those_of_float64(chunk):
    hidden, head, labels = _inputs()
    weight = np.random.default_rng(1).normal(size=(B, M)).astype(np.float32)
    weight[0, 2] = 0.0  # a masked token

    def total(hidden, head):
        return jnp.sum(weight * token_logps(hidden, head, jnp.asarray(labels), chunk))

    hidden_grad, head_grad = jax.jit(jax.grad(total, (0, 1)))(hidden, head)
    _, probs = _oracle(hidden, head, labels)
    wrong = weight[..., None] * (np.eye(V)[labels] - probs)
    np.testing.assert_allclose(hidden_grad, wrong @ head, rtol=1e-5, atol=1e-5)
    wanted = np.einsum("bmv,bmd->vd", wrong, hidden)
    np.testing.assert_allclose(head_grad, wanted, rtol=1e-5, atol=1e-5)
    assert not np.asarray(hidden_grad)[0, 2].any()


def test_no_array_of_all_logits_exists():
    rows, length, width, vocab, chunk = 1, 64, 4, 1000, 8

    def total(hidden, head, labels):
        return token_logps(hidden, head, labels, chunk).sum()

    text = (
        jax.jit(jax.grad(total, (0, 1)))
        .lower(
            jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
            jax.ShapeDtypeStruct((vocab, width), jnp.float32),
            jax.ShapeDtypeStruct((rows, length), jnp.int32),
        )
        .compile()
    )
    memory = text.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * rows * chunk * vocab


def test_bfloat16_states_keep_float32_log_probs():
    hidden, head, labels = _inputs()
    found = jax.jit(token_logps, static_argnums=3)(jnp.bfloat16(hidden), head, labels, 3)
    rounded = (
        np.asarray(jnp.bfloat16(hidden), np.float32),
        np.asarray(jnp.bfloat16(head), np.float32),
    )
    wanted, _ = _oracle(*rounded, labels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
