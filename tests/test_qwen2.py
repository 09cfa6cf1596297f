"""The network: counts, equivalent lowerings, causality and isolation by gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.errors import UserError
from rpo_jax.model.qwen2 import (
    Network,
    abstract_params,
    count_params,
    forward,
    head_table,
    init_params,
    param_axes,
)
from rpo_jax.model.shape import load_shape, parse_shape, shape_to_hf
from tests.tiny import NETWORK, SHAPE, relative_difference

# Published sizes (Qwen2.5 technical report, arXiv:2412.15115, and the files on the hub).
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert count_params(Network(load_shape(name))) == PUBLISHED[name]


def test_every_parameter_has_axes():
    for tied in (False, True):
        network = Network(dataclasses.replace(SHAPE, tie_word_embeddings=tied))
        axes = param_axes(network)
        jax.tree.map(
            lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim),
            abstract_params(network),
            axes,
        )
        assert ("head" in axes) != tied


def _ids(rows=2, length=10, seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, SHAPE.vocab_size, (rows, length)), jnp.int32)
    one, zero = jnp.ones_like(tokens), jnp.zeros_like(tokens)
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1))
    return tokens, one, zero, positions


@pytest.fixture(scope="module")
def params():
    return init_params(NETWORK, jax.random.key(0))


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False},
        {"attention": "blocks"},
        {"attention": "blocks", "remat": "dots"},
        {"remat": "full"},
        {"remat": "attention"},
        {"remat": "mlp"},
        {"remat": "dots"},
        {"remat": "full", "scan_layers": False},
        {"remat": "dots", "offload": True},
    ],
    ids=str,
)
def test_loop_and_remat_change_nothing(params, changes):
    ids = _ids()

    def value_and_grad(network):
        def total(params):
            return jnp.sum(jnp.sin(forward(network, params, *ids)))

        return jax.jit(jax.value_and_grad(total))(params)

    plain = value_and_grad(NETWORK)
    other = value_and_grad(dataclasses.replace(NETWORK, **changes))
    assert relative_difference(plain, other) < 1e-5


def _influence(params, ids, query):
    """Which positions of the input embedding the hidden state at `query` depends on, [T]."""
    tokens, *rest = ids

    def state(table):
        changed = {**params, "embed": {"table": table}}
        unique = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return jnp.sum(jnp.sin(forward(NETWORK, changed, unique, *rest)[0, query]))

    gradient = jax.grad(state)(params["embed"]["table"])
    return np.abs(np.asarray(gradient)[: tokens.shape[1]]).sum(-1) > 0


def test_no_token_sees_the_future(params):
    ids = _ids(rows=1)
    for query in (0, 4, 9):
        assert (_influence(params, ids, query) == (np.arange(10) <= query)).all()


def test_documents_do_not_see_each_other(params):
    tokens, _, zero, _ = _ids(rows=1)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0]], jnp.int32)
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0, 1, 0]], jnp.int32)
    seen = _influence(params, (tokens, segments, zero, positions), query=5)
    assert seen.tolist() == [t in (3, 4, 5) for t in range(10)]


def test_responses_see_their_prompt_and_themselves(params):
    tokens, one, _, _ = _ids(rows=1)
    branches = jnp.array([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2]], jnp.int32)
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]], jnp.int32)
    seen = _influence(params, (tokens, one, branches, positions), query=8)
    assert seen.tolist() == [t in (0, 1, 2, 3, 7, 8) for t in range(10)]


def test_packed_documents_equal_separate_ones(params):
    rng = np.random.default_rng(3)
    first, second = (rng.integers(0, SHAPE.vocab_size, n).astype(np.int32) for n in (4, 6))

    def alone(tokens):
        tokens = jnp.asarray(tokens)[None]
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        one, zero = jnp.ones_like(tokens), jnp.zeros_like(tokens)
        return forward(NETWORK, params, tokens, one, zero, positions)[0]

    packed = forward(
        NETWORK,
        params,
        jnp.concatenate([first, second])[None],
        jnp.array([[1] * 4 + [2] * 6], np.int32),
        jnp.zeros((1, 10), jnp.int32),
        jnp.array([[*range(4), *range(6)]], jnp.int32),
    )[0]
    np.testing.assert_allclose(packed[:4], alone(first), atol=1e-5)
    np.testing.assert_allclose(packed[4:], alone(second), atol=1e-5)


def test_bfloat16_compute_stays_near_float32(params):
    ids = _ids()
    wide = forward(NETWORK, params, *ids) @ head_table(params).T
    narrow_network = dataclasses.replace(NETWORK, compute_dtype="bfloat16")
    narrow = forward(narrow_network, params, *ids)
    assert narrow.dtype == jnp.bfloat16
    narrow = narrow.astype(jnp.float32) @ head_table(params).T
    assert np.linalg.norm(narrow - wide) < 0.05 * np.linalg.norm(wide)


def test_shape_survives_the_hugging_face_format():
    assert parse_shape(shape_to_hf(SHAPE), "here") == SHAPE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama', only 'qwen2' is supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_scaling="),
        ({"hidden_size": None}, "hidden_size=None, a positive int is wanted"),
        ({"num_key_value_heads": 3}, "4 query heads do not share 3 kv heads"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0, a positive float is wanted"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no', true or false"),
        ({"head_dim": 5}, "head_dim=5"),
    ],
)
def test_another_architecture_is_refused_by_name(change, message):
    with pytest.raises(UserError) as error:
        parse_shape(shape_to_hf(SHAPE) | change, "config.json")
    assert message in str(error.value)
    assert str(error.value).startswith("config.json: ")


def test_missing_shape_lists_the_shipped_ones():
    with pytest.raises(UserError, match=r"qwen2\.5-72b"):
        load_shape("qwen2.5-71b")
