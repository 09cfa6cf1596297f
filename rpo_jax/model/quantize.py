"""Frozen kernels in 8 or 4 bits, and the product with a kernel in whatever form it is held.

Source: arXiv:2305.14314 (QLoRA, nf4); the quantiser is qwix.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.errors import UserError

Params = dict[str, Any]

# One scale for so many values along the contraction. Fixed, so that the numbers do not depend on
# the mesh; of `down`, whose contraction is the one that is cut over `tensor`, small enough that the
# 29568 of the 72B split into a number of tiles (924) that 2 and 4 divide.
_TILE, _TILE_OF_CUT = 64, 32


def count_inputs(name: str) -> int:
    """How many leading axes of a projection's kernel are contracted: of `o` heads and head_dim."""
    return 2 if name == "o" else 1


def quantize_layers(layers: Params, how: str) -> Params:
    """Stacked layers with their kernels as qwix `QArray`s; norms and biases stay as they are.

    Args:
        layers: as in `init_params`, each kernel with a leading axis L.
        how: "int8" or "nf4". A kernel of `n` bits a value then takes `n` bits and one scale, in the
            kernel's own dtype, for 64 values (32 in `down`).
    """

    def one(path: Any, leaf: Array) -> Any:
        if path[-1].key != "kernel":
            return leaf
        return quantize_kernel(leaf, path[-2].key, how)

    return jax.tree_util.tree_map_with_path(one, layers)


def quantize_kernel(kernel: Float[Array, "..."], name: str, how: str) -> Any:
    """The stacked kernel [L, *inputs, *outputs] of the projection `name`, as a `QArray`."""
    axis = count_inputs(name)  # the last of the contracted axes, L being the first
    tile = math.gcd(kernel.shape[axis], _TILE_OF_CUT if name == "down" else _TILE)
    others = [other for other in range(kernel.ndim) if other != axis]
    return _qwix().quantize(kernel, how, tiled_axes={axis: tile}, channelwise_axes=others)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise UserError("lora.quantize wants pip install 'rpo_jax[quant]'") from error
    return qwix


def is_quantized(leaf: Any) -> bool:
    """Whether a kernel is a `QArray`."""
    return hasattr(leaf, "qvalue")


def multiply(x: Float[Array, "..."], kernel: Any, inputs: int) -> Float[Array, "..."]:
    """X @ kernel over the first `inputs` axes of the kernel, in the dtype of x.

    A quantised kernel is widened for the product only, in the backward pass once more: what is kept
    between the two is the quantised form.
    """
    if not is_quantized(kernel):
        return jnp.tensordot(x, kernel.astype(x.dtype), axes=inputs)

    @jax.checkpoint
    def widened(x: Array, kernel: Any) -> Array:
        return jnp.tensordot(x, _qwix().dequantize(kernel).astype(x.dtype), axes=inputs)

    return widened(x, jax.lax.stop_gradient(kernel))
