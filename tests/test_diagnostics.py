"""Gradients of each term, and the warnings of a run that goes wrong quietly."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest

from rpo_jax.model.qwen2 import init_params
from rpo_jax.training.diagnostics import Watch, make_term_gradients
from rpo_jax.training.step import compute_gradients
from tests.tiny import NETWORK, SHAPE, make_config, make_work, pair_batch, pairs

SMALL = dataclasses.replace(NETWORK, shape=dataclasses.replace(SHAPE, num_hidden_layers=1))


def test_term_gradients_make_up_the_gradient():
    """|dpo + alpha nll|^2 by the law of cosines is the squared norm of the whole gradient."""
    alpha = 0.7
    work = make_work(make_config(rpo={"alpha": alpha}, train={"micro_batches": 2}), SMALL)
    params = init_params(SMALL, jax.random.key(0))
    batch = pair_batch(pairs())
    found = make_term_gradients(work)(params, {}, work.hyper, batch)
    whole = partial(compute_gradients, work.objective, 1)
    gradient, _ = jax.jit(whole)(params, {}, work.hyper, batch)
    squared = sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradient))
    dpo, nll, cosine = (
        float(found[name]) for name in ("grad_norm_dpo", "grad_norm_nll", "grad_cosine_dpo_nll")
    )
    assert 0.01 < abs(cosine) < 1
    np.testing.assert_allclose(
        dpo**2 + (alpha * nll) ** 2 + 2 * alpha * dpo * nll * cosine, squared, rtol=1e-5
    )


def test_a_single_term_has_no_cosine():
    work = make_work(make_config(rpo={"preference": "none"}), SMALL)
    shapes = jax.eval_shape(lambda: (init_params(SMALL, jax.random.key(0)), pair_batch(pairs())))
    found = jax.eval_shape(make_term_gradients(work), shapes[0], {}, work.hyper, shapes[1])
    assert found.keys() == {"grad_norm_nll"}


@pytest.mark.parametrize(
    ("name", "bad", "good", "patience"),
    [
        ("chosen_log_ratio", -0.1, 0.1, 20),
        ("heldout/chosen_log_ratio", -0.1, -1e-6, 1),
        ("dpo", math.log(2) + 1e-6, 0.69, 20),
    ],
)
def test_what_lasts_is_warned_of_once(caplog, name, bad, good, patience):
    watch = Watch()
    values = [bad] * (patience - 1) + [good] + [bad] * 3 * patience
    for step, value in enumerate(values):
        watch.look(step, {name: value, "loss": 1.0})
    (warning,) = caplog.messages
    assert warning.startswith(f"warning: step {2 * patience - 1}: {name} is ")
