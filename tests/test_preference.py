"""Preference losses by hand, and against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.losses.preference import dpo, ipo, orpo, rpo, sequence_nll, simpo


def test_policy_equal_to_reference_costs_ln_2():
    np.testing.assert_allclose(dpo(jnp.zeros(3), beta=0.1), math.log(2), atol=1e-7)


def test_hand_worked_pair():
    # ratios: chosen -2 - (-3) = 1, rejected -5 - (-4.5) = -0.5; margin 1.5; beta 0.2
    loss = dpo(jnp.array([1.5]), beta=0.2)
    np.testing.assert_allclose(loss, math.log(1 + math.exp(-0.3)), rtol=1e-6)
    # NLL of a chosen answer of 4 tokens with log-probability -2 is 0.5 nats/token
    nll = sequence_nll(jnp.array([-2.0]), jnp.array([4]))
    np.testing.assert_allclose(nll, 0.5)
    np.testing.assert_allclose(
        rpo(loss[0], nll[0], alpha=0.5), math.log(1 + math.exp(-0.3)) + 0.25, rtol=1e-6
    )


def test_swapped_pair_flips_the_margin():
    margin = jnp.array([2.0, -7.0])
    gradient = jax.grad(lambda m: dpo(m, 0.5).sum())
    np.testing.assert_allclose(dpo(margin, 0.5) - dpo(-margin, 0.5), -0.5 * margin, rtol=1e-5)
    np.testing.assert_allclose(gradient(margin) + gradient(-margin), -0.5, rtol=1e-6)


def test_alpha_zero_is_dpo():
    assert rpo(0.7, 123.0, alpha=0.0) == 0.7


@pytest.mark.parametrize("margin", [-4e3, -80.0, 0.0, 80.0, 4e3])
def test_far_margins_stay_finite(margin):
    value, gradient = jax.value_and_grad(lambda m: dpo(m, 1.0, 0.1).sum())(jnp.array([margin]))
    wanted = 0.9 * np.logaddexp(0, -margin) + 0.1 * np.logaddexp(0, margin)
    np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-30)
    assert np.isfinite(gradient).all()


def test_label_smoothing_is_least_where_the_preference_is_that_sure():
    # d/dz: sigmoid(z) = 1 - s at the minimum
    s = 0.2
    best = math.log((1 - s) / s)
    slope = jax.grad(lambda m: dpo(m, 1.0, s).sum())(jnp.array([best]))
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_empty_slot_costs_nothing():
    np.testing.assert_allclose(sequence_nll(jnp.zeros(1), jnp.zeros(1)), 0)


def test_ipo_is_least_at_its_margin():
    # tau 0.1 aims at a margin of 5 nats: (2 - 5)^2 and (-1 - 5)^2
    np.testing.assert_allclose(ipo(jnp.array([5.0, 2.0, -1.0]), tau=0.1), [0, 9, 36], atol=1e-5)


def test_simpo_by_hand():
    # means -0.5 and -0.9 nats/token: z = 2 * 0.4 - 0.3
    loss = simpo(jnp.array([-0.5]), jnp.array([-0.9]), beta=2.0, gamma=0.3)
    np.testing.assert_allclose(loss, math.log(1 + math.exp(-0.5)), rtol=1e-6)


def test_orpo_by_hand():
    # p = 0.5 has odds 1, p = 0.2 has odds 1/4: sigmoid(log 4) = 4/5
    loss = orpo(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.2])))
    np.testing.assert_allclose(loss, -math.log(0.8), rtol=1e-6)


@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-3, -30.0, -3e3])
def test_orpo_stays_finite(mean):
    gradient = jax.value_and_grad(lambda chosen, rejected: orpo(chosen, rejected).sum(), (0, 1))
    value, slopes = gradient(jnp.array([mean]), jnp.array([-1.0]))
    assert np.isfinite(value) and np.isfinite(slopes).all()
