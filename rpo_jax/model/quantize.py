"""Frozen kernels in 8 or 4 bits, and the product with a kernel in whatever form it is held.

Source: arXiv:2305.14314 (QLoRA, nf4); the quantiser is qwix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rpo_jax.errors import UserError, say_install
from rpo_jax.sharding.rules import constrain, gathered, is_whole

Params = dict[str, Any]

# One scale for so many values along the contraction. Fixed, so that the numbers do not depend on
# the mesh; of `down`, whose contraction is the one that is cut over `tensor`, small enough that the
# 29568 of the 72B split into a number of tiles (924) that 2 and 4 divide.
_TILE, _TILE_OF_CUT = 64, 32

# The numbers that the codes of nf4 stand for. Source: arXiv:2305.14314, appendix E.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turned:
    """A kernel of one layer with its outputs first: [*outputs, inputs].

    One CPU multiplies a few rows by it up to 1.7 times as fast.
    """

    kernel: Float[Array, "..."]


def turn(kernel: Float[Array, "..."], inputs: int) -> Turned:
    """The kernel [*inputs, *outputs] turned."""
    contracted = math.prod(kernel.shape[:inputs])
    return Turned(kernel.reshape(contracted, -1).T.reshape(*kernel.shape[inputs:], contracted))


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
    """The stacked kernel [L, *inputs, *outputs] of the projection `name`, as a `QArray`.

    A layer after the other: at once it takes twenty times the memory of the kernel.
    """
    axis = count_inputs(name) - 1  # the last of the contracted axes
    tile = math.gcd(kernel.shape[1 + axis], _TILE_OF_CUT if name == "down" else _TILE)
    others = [other for other in range(kernel.ndim - 1) if other != axis]
    quantize = partial(
        _qwix().quantize, qtype=how, tiled_axes={axis: tile}, channelwise_axes=others
    )
    return jax.lax.map(quantize, kernel)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise UserError(f"lora.quantize wants {say_install('quant')}") from error
    return qwix


def is_quantized(leaf: Any) -> bool:
    """Whether a kernel is a `QArray`."""
    return hasattr(leaf, "qvalue")


def widen(kernel: Any, inputs: int) -> Float[Array, "..."]:
    """The kernel of one layer as numbers, in the dtype of its scales: what `qwix.dequantize` gives.

    Codes of nf4 choose among constants, bit by bit. A look-up in a table is what a TPU is slow at,
    and the partitioner would have every device look up the whole kernel.
    """
    codes, scale, axis = kernel.qvalue, kernel.scale, inputs - 1
    values = _choose(codes) if kernel.qtype == "nf4" else codes
    shape = codes.shape
    tiles = values.astype(scale.dtype).reshape(
        *shape[:axis], scale.shape[axis], -1, *shape[inputs:]
    )
    return (tiles * jnp.expand_dims(scale, inputs)).reshape(shape)


def _choose(codes: Array) -> Float[Array, "..."]:
    codes = codes.astype(jnp.int32)
    left: Sequence[Any] = [jnp.float32(value) for value in _NF4]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        left = [jnp.where(is_set, *pair) for pair in zip(left[1::2], left[::2], strict=True)]
    return left[0]


def multiply(
    x: Float[Array, "..."], kernel: Any, inputs: int, axes: tuple[str, ...]
) -> Float[Array, "..."]:
    """X @ kernel over the first `inputs` axes of the kernel, in the dtype of x.

    A quantised kernel is widened for the product only, in the backward pass once more: what is kept
    between the two is the quantised form. `axes` are the kernel's logical ones; its wide form lies
    where its codes do.
    """
    if isinstance(kernel, Turned):
        return _turned_product(x, kernel.kernel.astype(x.dtype), inputs)
    if not is_quantized(kernel):
        return _product(x, kernel.astype(x.dtype), inputs)

    @jax.checkpoint
    def widened(x: Array, kernel: Any) -> Array:
        wide = constrain(widen(kernel, inputs).astype(x.dtype), *gathered(axes))
        return _product(x, wide, inputs)

    return widened(x, jax.lax.stop_gradient(kernel))


def _product(x: Array, kernel: Array, inputs: int) -> Array:
    """The tensordot; on one device of matrices, which XLA on CPU need not turn for gradients."""
    if not is_whole():
        return jnp.tensordot(x, kernel, axes=inputs)
    contracted = math.prod(kernel.shape[:inputs])
    y = x.reshape(-1, contracted) @ kernel.reshape(contracted, -1)
    return y.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[inputs:])


def _turned_product(x: Array, kernel: Array, inputs: int) -> Array:
    """The same by a turned kernel; the barriers keep the compiler from turning it round."""
    contracted = kernel.shape[-1]
    x_CM = jax.lax.optimization_barrier(x.reshape(-1, contracted).T)
    y_OM = jax.lax.optimization_barrier(kernel.reshape(-1, contracted) @ x_CM)
    return y_OM.T.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[:-1])
