"""Adapters: what they compute, how they begin, what is trained, and how their bases are held."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax import cli
from rpo_jax.config import TARGETS, Lora
from rpo_jax.model.cache import forward_cached, make_cache, split_layers
from rpo_jax.model.lora import merge_kernel
from rpo_jax.model.quantize import multiply, quantize_kernel, widen
from rpo_jax.model.qwen2 import abstract_params, forward, init_params
from rpo_jax.sharding.rules import batch_sharding
from rpo_jax.training.evaluation import put_batch
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.state import abstract_state, abstract_weights, split_params
from rpo_jax.training.step import compute_gradients, draw_dropout_seeds, make_score, make_step
from tests.test_train import REPO, workdir
from tests.tiny import (
    MESHES,
    NETWORK,
    SHAPE,
    make_config,
    make_work,
    pair_batch,
    pairs,
    relative_difference,
)

__all__ = ["workdir"]  # the fixture

LORA = Lora(rank=3, alpha=6.0)
SMALL = dataclasses.replace(
    NETWORK, shape=dataclasses.replace(SHAPE, num_hidden_layers=2), lora=LORA
)


def perturbed(network, seed=0, size=0.3):
    """Random weights whose adapters have both factors away from zero."""
    params = jax.jit(partial(init_params, network))(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params["lora"])
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    drawn = [size * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return {**params, "lora": jax.tree.unflatten(tree, drawn)}


def merged(network, params):
    scale = network.lora.alpha / network.lora.rank
    layers = {room: dict(params["layers"][room]) for room in ("attention", "mlp")}
    for room, pairs_ in params["lora"].items():
        for name, pair in pairs_.items():
            old = layers[room][name]
            layers[room][name] = {**old, "kernel": merge_kernel(old["kernel"], **pair, scale=scale)}
    base = {key: value for key, value in params.items() if key != "lora"}
    return {**base, "layers": {**params["layers"], **layers}}


def hidden(network, params, **more):
    batch = pair_batch(pairs())
    ids = (batch[key] for key in ("tokens", "segment_ids", "branch_ids", "positions"))
    return jax.jit(partial(forward, network))(params, *ids, **more)


@pytest.mark.parametrize("init", ["b_zero", pytest.param("a_zero", marks=pytest.mark.full)])
def test_adapters_begin_as_no_change_and_can_learn(init):
    network = dataclasses.replace(SMALL, lora=dataclasses.replace(LORA, init=init))
    params = init_params(network, jax.random.key(0))
    base = {key: value for key, value in params.items() if key != "lora"}
    np.testing.assert_array_equal(hidden(network, params), hidden(network.base, base))
    zero, drawn = ("b", "a") if init == "b_zero" else ("a", "b")
    for room in params["lora"].values():
        for pair in room.values():
            assert not np.any(pair[zero])
            assert np.std(pair[drawn]) > 0.05
            assert pair["a"].dtype == pair["b"].dtype == jnp.float32
    # The factor that is zero has a gradient from the first step on, the other one none yet.
    work = make_work(make_config(), network)
    compute = jax.jit(partial(compute_gradients, work.objective, 1))
    with jax.set_mesh(work.mesh):
        grads, _ = compute(*split_params(params), work.hyper, pair_batch(pairs()))
    for room in grads["lora"].values():
        for pair in room.values():
            assert np.linalg.norm(pair[zero]) > 0
            assert not np.any(pair[drawn])


@pytest.mark.parametrize("targets", [TARGETS, pytest.param(("q", "down"), marks=pytest.mark.full)])
def test_an_adapted_model_is_the_merged_one(targets):
    network = dataclasses.replace(SMALL, lora=dataclasses.replace(LORA, targets=targets))
    params = perturbed(network)
    assert {name for room in params["lora"].values() for name in room} == set(targets)
    plain = hidden(network.base, merged(network, params))
    assert relative_difference(plain, hidden(network, params)) < 2e-6
    assert relative_difference(plain, hidden(network.base, params | {"lora": {}})) > 1e-2


@pytest.mark.full
def test_gradients_follow_from_those_of_the_merged_kernel():
    """dA = scale dW B^T and dB = scale A^T dW, with dW the gradient of the merged kernel."""
    params = perturbed(SMALL)
    batch = pair_batch(pairs())
    work, base_work = make_work(make_config(), SMALL), make_work(make_config(), SMALL.base)
    with jax.set_mesh(work.mesh):
        grads, means = jax.jit(partial(compute_gradients, work.objective, 1))(
            *split_params(params), work.hyper, batch
        )
        whole, base_means = jax.jit(partial(compute_gradients, base_work.objective, 1))(
            merged(SMALL, params), {}, work.hyper, batch
        )
    np.testing.assert_allclose(means["dpo"], base_means["dpo"], rtol=1e-5)
    assert grads.keys() == {"lora"}
    scale, rank = LORA.alpha / LORA.rank, LORA.rank
    for room, pairs_ in params["lora"].items():
        for name, pair in pairs_.items():
            a, b = pair["a"].reshape(2, -1, rank), pair["b"].reshape(2, rank, -1)
            change = whole["layers"][room][name]["kernel"].reshape(2, a.shape[1], b.shape[2])
            found = grads["lora"][room][name]
            wanted = {
                "a": scale * jnp.einsum("lio,lro->lir", change, b).reshape(pair["a"].shape),
                "b": scale * jnp.einsum("lir,lio->lro", a, change).reshape(pair["b"].shape),
            }
            assert relative_difference(wanted, dict(found)) < 1e-5, name


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantised_product_and_its_gradient(how):
    kernel = jax.random.normal(jax.random.key(0), (2, 4, 32, 48)) * 0.02
    x = jax.random.normal(jax.random.key(1), (3, 5, 4, 32))
    packed = quantize_kernel(kernel, "o", how)
    first = jax.tree.map(lambda leaf: leaf[0], packed)
    import qwix

    widened = qwix.dequantize(first)
    error = jnp.linalg.norm(widened - kernel[0]) / jnp.linalg.norm(kernel[0])
    assert 1e-3 < error < {"int8": 0.01, "nf4": 0.12}[how]
    bits = sum(leaf.size * jnp.finfo(leaf.dtype).bits for leaf in [packed.scale])
    assert bits == kernel.size / 32 * 32  # one float32 scale for each 32 values: all of head_dim
    np.testing.assert_array_equal(widen(first, 2), widened)
    axes = ("heads", "head_dim", "embed")
    product, pull = jax.vjp(lambda x: multiply(x, first, 2, axes), x)
    plain, pull_plain = jax.vjp(lambda x: jnp.tensordot(x, widened, 2), x)
    np.testing.assert_allclose(product, plain, rtol=1e-5, atol=1e-6)
    grad = jax.random.normal(jax.random.key(2), product.shape)
    np.testing.assert_allclose(pull(grad)[0], pull_plain(grad)[0], rtol=1e-5, atol=1e-6)
    # What waits for the backward pass is the packed kernel, not the widened one.
    waiting = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull)}
    assert (widened.shape, "float32") not in waiting


def test_tiles_of_the_72b_divide_over_four_and_eight_chips():
    kernel = jax.ShapeDtypeStruct((2, 29568, 64), jnp.bfloat16)
    packed = jax.eval_shape(partial(quantize_kernel, name="down", how="nf4"), kernel)
    assert packed.scale.shape == (2, 29568 // 32, 64) and packed.scale.dtype == jnp.bfloat16
    assert packed.scale.shape[1] % 4 == 0
    q = jax.ShapeDtypeStruct((2, 8192, 64, 128), jnp.bfloat16)
    packed = jax.eval_shape(partial(quantize_kernel, name="q", how="nf4"), q)
    assert packed.scale.shape == (2, 128, 64, 128)


@pytest.mark.full
@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_any_mesh_and_micro_batch_gives_the_same_gradients(quantize):
    """With dropout too: a row's mask is its own."""
    lora = dataclasses.replace(LORA, dropout=0.2)
    wide = dataclasses.replace(
        SMALL.shape, hidden_size=128, intermediate_size=64, initializer_range=0.08
    )
    network = dataclasses.replace(SMALL, shape=wide, lora=lora, quantize=quantize)
    params = jax.device_get(perturbed(network, size=0.1))
    batch = pair_batch(pairs())
    batch["dropout_seed"] = np.asarray(draw_dropout_seeds(0, jnp.int32(3), 8))
    found = []
    for mesh, micro_batches, devices in (("data8", 1, 1), ("data2-fsdp2-tensor2", 2, 8)):
        axes = dataclasses.asdict(MESHES[mesh]) if devices > 1 else {}
        config = make_config(mesh=axes, train={"micro_batches": micro_batches})
        work = make_work(config, network, jax.devices()[:devices])
        abstract = abstract_weights(network, work.mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, split_params(abstract))
        with jax.set_mesh(work.mesh):
            compute = jax.jit(
                partial(compute_gradients, work.objective, micro_batches),
                in_shardings=(*places, None, batch_sharding(work.mesh)),
            )
            trained, frozen = jax.device_put(split_params(params), places)
            found.append(
                jax.device_get(compute(trained, frozen, work.hyper, put_batch(batch, work.mesh)))
            )
    assert relative_difference(found[0][0], found[1][0]) < 1e-5
    assert relative_difference(found[0][1], found[1][1]) < 1e-5


def test_dropout_is_for_training_alone_and_keeps_the_mean():
    network = dataclasses.replace(SMALL, lora=dataclasses.replace(LORA, dropout=0.5))
    params = perturbed(network)
    plain = hidden(SMALL, params)
    np.testing.assert_array_equal(hidden(network, params), plain)
    seeds = jnp.arange(8, dtype=jnp.uint32)
    dropped = hidden(network, params, dropout_seed_B=seeds)
    assert relative_difference(plain, dropped) > 1e-2
    other = hidden(network, params, dropout_seed_B=seeds.at[0].set(77))
    assert not np.array_equal(other[0], dropped[0])
    np.testing.assert_array_equal(other[1:], dropped[1:])


def test_a_live_reference_is_the_model_without_its_adapters():
    """In loss and gradient, with dropout and trained rows that the reference knows nothing of."""
    lora = dataclasses.replace(LORA, dropout=0.5, trained_tokens=("a", "b"))
    network = dataclasses.replace(SMALL, lora=lora)
    params = perturbed(network)
    params["rows"] = {name: rows + 1.0 for name, rows in params["rows"].items()}
    base = {name: params[name] for name in ("embed", "layers", "norm", "head")}
    trained, frozen = split_params(params)
    batch = pair_batch(pairs(), reference=False)
    results = []
    for reference in ("stored", "live"):
        work = make_work(make_config(rpo={"reference": reference}), network)
        rows = batch | {"dropout_seed": np.arange(8, dtype=np.uint32)}
        if reference == "stored":
            score = make_score(make_work(make_config(), SMALL), jax.eval_shape(lambda: base))
            rows["reference_logps"] = np.asarray(score(base, batch))
        compute = jax.jit(partial(compute_gradients, work.objective, 2))
        results.append(compute(trained, frozen, work.hyper, rows))
    (wanted, means), (found, live_means) = results
    assert abs(float(means["margin"])) > 1e-2
    assert relative_difference(means, live_means) < 1e-5
    assert relative_difference(wanted, found) < 1e-5


def test_a_step_moves_adapters_alone_and_sums_their_gradients_in_float32():
    network = dataclasses.replace(
        SMALL, param_dtype="bfloat16", compute_dtype="bfloat16", scan_layers=True
    )
    work = make_work(make_config(mesh={"data": 4, "tensor": 2}), network, jax.devices())
    tx = make_optimizer(work.config.optim)
    with jax.set_mesh(work.mesh):
        abstract = abstract_state(network, tx, work.mesh)
        assert abstract.params.keys() == {"lora"}
        moments = sum(leaf.size for leaf in jax.tree.leaves(abstract.optimizer))
        assert moments < 2.1 * sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        _, frozen = split_params(abstract_weights(network, work.mesh))
        step = make_step(work, tx, abstract)
        lowered = step.lower(abstract, frozen, work.hyper, pair_batch(pairs()))
        text = lowered.compile().as_text()
    rank = LORA.rank
    summed = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? (?:all-reduce|reduce-scatter)", text)
    of_factors = [kind for kind, sizes in summed if str(rank) in sizes.split(",")]
    assert of_factors and set(of_factors) == {"f32"}, summed


def test_a_merge_is_computed_in_float32():
    kernel = jnp.full((1, 4, 4), 1.0, jnp.bfloat16)
    a, b = jnp.full((1, 4, 1), 0.1), jnp.full((1, 1, 4), 0.1)
    result = merge_kernel(kernel, a, b, 1.0)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, jnp.bfloat16(1.01))


@pytest.mark.full
@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_cached_decoding_knows_adapters_and_quantised_kernels(quantize):
    network = dataclasses.replace(SMALL, quantize=quantize)
    params = perturbed(network)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 90, (2, 9)).astype(np.int32))
    one = jnp.ones_like(tokens)
    positions = jnp.tile(jnp.arange(9, dtype=jnp.int32), (2, 1))
    want = jax.jit(partial(forward, network))(params, tokens, one, 0 * one, positions)
    weights = split_layers(params, turned=True)
    own, none = make_cache(network, 2, 9), make_cache(network, 1, 0)
    step = jax.jit(partial(forward_cached, network, weights))
    for begin, end in ((0, 5), (5, 9)):
        start = jnp.full(2, begin, jnp.int32)
        got, own = step(tokens[:, begin:end], start, own, none)
        np.testing.assert_allclose(got, want[:, begin:end], rtol=0, atol=2e-5)


def test_learning_rates_go_by_method():
    base = REPO / "configs/fictional_rpo.py"
    for rank, rate in ((0, 7e-7), (8, 1e-5)):
        words = ["--config.optim.learning_rate=0.0", f"--config.lora.rank={rank}"]
        assert cli.load_config(str(base), words).optim.learning_rate == rate


def test_parameters_of_the_72b_adapters():
    """Rank 16 on all projections of the 72B: 16 (in + out) values each, 80 layers."""
    from rpo_jax.model.shape import load_shape

    network = dataclasses.replace(
        NETWORK, shape=load_shape("qwen2.5-72b"), lora=Lora(rank=16), param_dtype="bfloat16"
    )
    adapters = abstract_params(network)["lora"]
    wide, kv, mlp = 8192, 1024, 29568
    sides = 2 * (wide + wide) + 2 * (wide + kv) + 3 * (wide + mlp)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 80 * 16 * sides
