"""Where a state lies: the arrays of any optimizer like the weights they belong to."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding

from rpo_jax.config import Mesh, Optim
from rpo_jax.errors import UserError
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.rules import make_shardings
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.state import abstract_state
from tests.tiny import NETWORK

# Each with how many of its arrays are as large as one of the ten kernels and biases of heads.
CHAINS = {
    "ours": (make_optimizer(Optim(weight_decay=0.1)), 20),
    "momentum": (optax.trace(0.9), 10),
    "lion, clipped": (optax.chain(optax.clip(1.0), optax.scale_by_lion()), 10),
    "accumulating": (optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation(), 30),
    "with numbers inside": (optax.inject_hyperparams(optax.adam)(1e-3), 20),
    "masked": (optax.masked(optax.scale_by_adam(), lambda p: jax.tree.map(lambda _: True, p)), 20),
    "factored": (optax.adafactor(1e-3, min_dim_size_to_factor=8), 3),
}


@pytest.mark.parametrize("name", CHAINS)
def test_an_optimizer_lies_like_its_weights(name):
    tx, count = CHAINS[name]
    mesh = make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    state = abstract_state(NETWORK, tx, mesh)
    places = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(state.params) if leaf.ndim > 2}
    assert not any(place.is_fully_replicated for place in places.values())
    matrices = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape in places]
    alike = [leaf for leaf in matrices if leaf.sharding == places[leaf.shape]]
    assert len(alike) == count
    rest = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf not in matrices]
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in rest)


def test_moments_are_float32_whatever_the_weights_are():
    tx = make_optimizer(Optim(weight_decay=0.1))
    params = {"norm": {"scale": jnp.ones(4, jnp.bfloat16)}}
    before = tx.init(params)
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    _, after = tx.update(grads, before, params)
    for state in (before, after):
        assert {leaf.dtype for leaf in jax.tree.leaves(state[0][1:])} == {jnp.dtype("float32")}


def test_axes_that_collide_are_refused_by_the_name_of_the_array():
    mesh = make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    arrays = {"mlp": {"up": jnp.ones((8, 8)), "down": jnp.ones((8, 8))}}
    axes = {"mlp": {"up": ("embed", "mlp"), "down": ("mlp", "heads")}}
    told = "mlp/down would be cut over 'tensor' twice, along 'mlp' and 'heads'"
    with pytest.raises(UserError, match=told) as stop:
        make_shardings(arrays, axes, mesh)
    assert "mlp/up" not in str(stop.value)
