"""The TPU kernel against dense attention, run on a CPU step by step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.errors import UserError
from rpo_jax.model.attention import make_attend
from rpo_jax.model.qwen2 import init_params
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.step import compute_gradients
from tests.tiny import NETWORK, make_config, make_work, pairs, relative_difference, stack

ROWS = 256


def draw(kv_heads=2, width=32, batch=2, dtype=jnp.float32):
    """q, k, v, and what to multiply the result with."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = [4, kv_heads, kv_heads, 4]
    return [
        jax.random.normal(key, (batch, ROWS, n, width)).astype(dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


def documents(batch=2):
    """Three documents a row, cut elsewhere in each, and padding at the end."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.integers(1, ROWS, (batch, 3)), axis=1)
    segments = [np.digitize(np.arange(ROWS), row) + 1 for row in cuts]
    return jnp.array(np.where(np.stack(segments) == 4, 0, segments), jnp.int32)


def packed_pairs(batch=2):
    """Two pairs a row: prompt, chosen and rejected of odd lengths, then padding."""
    segments, branches = np.zeros((2, batch, ROWS), np.int32)
    for row in range(batch):
        at = 0
        for pair, lengths in enumerate([(50 + row, 31, 17), (70, 23, 41 - row)]):
            for branch, length in enumerate(lengths):
                segments[row, at : at + length] = pair + 1
                branches[row, at : at + length] = branch
                at += length
    return jnp.array(segments), jnp.array(branches)


SLOTS = (100, 70, 86)


def slotted_pairs(batch=2):
    """One pair a row in slots, none of them full."""
    segments, branches = np.zeros((2, batch, ROWS), np.int32)
    for row in range(batch):
        for branch, (at, length) in enumerate([(0, 90), (100, 41 + row), (170, 60 - row)]):
            segments[row, at : at + length] = 1
            branches[row, at : at + length] = branch
    return jnp.array(segments), jnp.array(branches)


ROWS_OF = {
    "documents": lambda: (documents(), None, ()),
    "pairs": lambda: (*packed_pairs(), ()),
    "slots": lambda: (*slotted_pairs(), SLOTS),
}


def value_and_gradients(name, arrays, segments, branches, slots=()):
    q, k, v, weight = arrays
    real = (segments > 0)[..., None, None]

    def total(q, k, v):
        y, _ = make_attend(name, segments, branches, slots)(q, k, v)
        return jnp.sum(jnp.where(real, y * weight, 0).astype(jnp.float32)), jnp.where(real, y, 0)

    grads, y = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return y, grads


@pytest.mark.parametrize("rows", ROWS_OF)
def test_kernel_gives_what_dense_attention_gives(rows):
    """Values and gradients, of documents and of branches, at a head narrower than the lanes."""
    wanted = value_and_gradients("dense", draw(), *ROWS_OF[rows]())
    found = value_and_gradients("splash_interpreted", draw(), *ROWS_OF[rows]())
    assert relative_difference(wanted[0], found[0]) < 2e-6
    assert relative_difference(wanted[1], found[1]) < 5e-6


@pytest.mark.parametrize("rows", ["pairs", "slots"])
def test_a_response_does_not_see_the_other_one(rows):
    """By gradient: exactly 0 from rejected tokens to chosen keys, and from one pair to another."""
    q, k, v, _ = draw(width=128, dtype=jnp.bfloat16)
    segments, branches, slots = ROWS_OF[rows]()
    meet = make_attend("splash_interpreted", segments, branches, slots)
    last = segments.max()
    query = ((segments == last) & (branches == 2))[..., None, None]

    def total(k, v):
        return jnp.sum(jnp.where(query, meet(q, k, v)[0], 0).astype(jnp.float32))

    seen = (segments == last) & (branches != 1)
    for grad in jax.jit(jax.grad(total, argnums=(0, 1)))(k, v):
        reached = np.abs(np.asarray(grad, np.float32)).sum(axis=(2, 3)) > 0
        np.testing.assert_array_equal(reached, seen)


def test_one_pair_a_row_has_slots_and_needs_no_wider_heads():
    config = make_config(
        model={"attention": "splash_interpreted"},
        data={"prompt_length": 128, "response_length": 64},
    )
    work = make_work(config)
    assert work.row_network.slots == (128, 64, 64) and not work.network.slots
    for section, field, value in (
        ("data", "pairs_per_row", 2),
        ("rpo", "share_prefix", False),
        ("model", "attention", "dense"),
    ):
        other = dataclasses.replace(getattr(config, section), **{field: value})
        lengths = {"prompt_length": 64} if field == "share_prefix" else {}
        data = dataclasses.replace(other if section == "data" else config.data, **lengths)
        changed = dataclasses.replace(config, **{section: other, "data": data})
        assert not make_work(changed).row_network.slots, field


@pytest.mark.parametrize("rows", ["pairs", "slots"])
@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 2, "seq": 2, "tensor": 2},
        pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.full),
        pytest.param({"seq": 2, "data": 2, "tensor": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_on_a_mesh_it_gives_the_same(mesh, rows):
    arrays = draw(kv_heads=4)
    wanted = value_and_gradients("dense", arrays, *ROWS_OF[rows]())
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **mesh}), jax.devices())):
        found = value_and_gradients("splash_interpreted", arrays, *ROWS_OF[rows]())
    assert relative_difference(wanted[0], found[0]) < 2e-6
    assert relative_difference(wanted[1], found[1]) < 5e-6


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("splash", {}, "runs on tpu devices, these are cpu"),
        ("splash_interpreted", {}, "rows of 24 tokens over mesh.seq=1"),
        ("splash_interpreted", {"prompt_length": 128, "response_length": 32}, "rows of 192 tokens"),
    ],
)
def test_where_it_cannot_run_it_is_refused(name, data, told):
    with pytest.raises(UserError, match=told):
        make_work(make_config(model={"attention": name}, data=data))


@pytest.mark.full
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "seq": 2, "tensor": 2}], ids=["one", "eight"])
def test_an_rpo_step_does_not_care_for_the_implementation(mesh):
    """Loss and gradients of a whole network, all layers recomputed, rows cut over every axis."""
    lengths = {"prompt_length": 128, "response_length": 64}
    found = {}
    for name in ("dense", "splash_interpreted"):
        network = dataclasses.replace(NETWORK, attention=name, remat="full")
        config = make_config(data=lengths, train={"batch_rows": 2}, mesh={"data": 1, **mesh})
        work = make_work(config, network, jax.devices()[: 8 if mesh else 1])
        rows = stack([work.make_row([pair]) for pair in pairs(2)])
        reference = np.full(rows["labels"].shape, -4, np.float32)
        rows["reference_logps"] = reference * rows["target_mask"]
        with jax.set_mesh(work.mesh):
            params = jax.jit(partial(init_params, network))(jax.random.key(0))
            gradients = jax.jit(partial(compute_gradients, work.objective, 1))
            found[name] = jax.device_get(gradients(params, {}, work.hyper, rows))
    assert relative_difference(found["dense"], found["splash_interpreted"]) < 2e-5
