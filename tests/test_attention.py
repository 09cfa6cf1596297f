"""Attention in blocks: what the dense one gives, for any segments and branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpo_jax.model import blocks
from rpo_jax.model.attention import make_attend
from tests.tiny import relative_difference

B, N, K, H = 2, 4, 2, 8


def _inputs(length, dtype=jnp.float32, seed=0):
    """Queries, keys, values and what weighs the outputs; ids of segments and branches."""
    rng = np.random.default_rng(seed)
    shapes = [(B, length, N, H), (B, length, K, H), (B, length, K, H), (B, length, N, H)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    cuts = np.sort(rng.integers(0, length, (B, 5)))
    parts = np.stack([np.searchsorted(row, np.arange(length), "right") for row in cuts])
    ids = [np.where(parts == 5, 0, parts // 3 + 1), np.where(parts == 5, 0, parts % 3)]
    return arrays, [jnp.asarray(x, jnp.int32) for x in ids]


def _gradients(implementation, arrays, ids):
    *qkv, weight = arrays

    def total(*qkv):
        y_BTNH, kept = make_attend(implementation, *ids)(*qkv)
        assert kept is None and y_BTNH.dtype == qkv[0].dtype
        return jnp.sum(y_BTNH * weight, dtype=jnp.float32), y_BTNH

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*qkv)


@pytest.mark.parametrize("length", [7, 127, 128, 300])
def test_blocks_are_the_dense_result(length):
    arrays, ids = _inputs(length)
    dense, blockwise = (_gradients(name, arrays, ids) for name in ("dense", "blocks"))
    assert relative_difference(dense, blockwise) < 1e-5


def test_blocks_in_bfloat16_are_as_near_to_float32_as_dense():
    arrays, ids = _inputs(300, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in arrays]
    exact = _gradients("dense", wide, ids)
    off = {
        name: relative_difference(exact, _gradients(name, arrays, ids))
        for name in ("dense", "blocks")
    }
    assert off["blocks"] < max(1.5 * off["dense"], 0.01)


def test_blocks_keep_no_scores_for_the_backward_pass():
    """Of layers that follow each other, one has its scores at a time."""
    length, layers = 2048, 4
    ids = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2
    q_BTNH = jax.ShapeDtypeStruct((1, length, N, H), jnp.float32)

    def temporary_bytes(implementation):
        def gradient(q_BTNH, ids):
            meet = make_attend(implementation, *ids)

            def layer(x_BTNH, _):
                return meet(x_BTNH, x_BTNH[:, :, :K], x_BTNH[:, :, K:])[0], None

            return jax.grad(lambda x: jax.lax.scan(layer, x, length=layers)[0].sum())(q_BTNH)

        compiled = jax.jit(gradient).lower(q_BTNH, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = N * length**2 * 4
    assert temporary_bytes("dense") > layers * scores
    assert temporary_bytes("blocks") < 2 * scores


def test_a_row_is_cut_without_a_gap():
    see = jnp.asarray(np.tril(np.ones((1, 300, 300), bool)))
    masks = blocks.cut_mask(see)
    assert [mask.shape for mask in masks] == [(1, 128, 128), (1, 128, 256), (1, 44, 300)]
    padded = [np.pad(mask, ((0, 0), (0, 0), (0, 300 - mask.shape[2]))) for mask in masks]
    np.testing.assert_array_equal(np.concatenate(padded, axis=1), see)


def test_partial_results_are_kept_under_their_name():
    """`remat="dots"` keeps the output of a layer's attention rather than computing it again."""
    arrays, ids = _inputs(40)
    keep = jax.checkpoint_policies.save_only_these_names(blocks.OUTPUT)

    def count(policy):
        meet = jax.checkpoint(
            lambda *qkv: make_attend("blocks", *ids)(*qkv)[0].sum(), policy=policy
        )
        text = str(jax.make_jaxpr(jax.grad(meet))(*arrays[:3]))
        return text.count("dot_general")

    assert count(keep) < count(None)
