"""Qwen2.5: pre-norm RMSNorm, grouped-query attention with q/k/v biases, RoPE, SwiGLU.

The modules are Flax Linen; what leaves this file is plain: `init_params` gives a nested dict of
arrays, `param_axes` the same dict with the logical axes of each, and `forward` is a pure function
of it. All layers lie stacked along a leading axis, so that the same code lowers 2 layers or 80.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from rpo_jax.config import Lora
from rpo_jax.config import Model as ModelConfig
from rpo_jax.errors import UserError
from rpo_jax.model.attention import Attend, make_attend, rope_frequencies, rotate
from rpo_jax.model.lora import (
    adapt,
    adapter_axes,
    find_table,
    init_adapters,
    row_axes,
    seed_dropout,
    take_rows,
)
from rpo_jax.model.quantize import Turned, is_quantized, multiply, quantize_layers
from rpo_jax.model.remat import INPUT, make_policy
from rpo_jax.model.shape import ModelShape
from rpo_jax.sharding.rules import constrain, gathered

Params = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A shape together with how it is computed; hashable, so that it can be a static argument.

    With `lora`, the weights of layers and tables are frozen and adapters are trained over them;
    `quantize` names the form in which frozen kernels are held ("" is `param_dtype`). `slots` are
    those of `PairLayout`, where the rows to be read are laid out so.
    """

    shape: ModelShape
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "dense"
    lora: Lora | None = None
    quantize: str = ""
    offload: bool = False
    slots: tuple[int, ...] = ()

    @property
    def base(self) -> "Network":
        """The same without adapters, its weights as they are stored."""
        return replace(self, lora=None, quantize="")


def make_network(shape: ModelShape, config: ModelConfig, lora: Lora) -> Network:
    """The network that a config asks for.

    Raises:
        UserError: adapters of a rank that no matrix of the model has.
    """
    if lora.rank > shape.hidden_size:
        raise UserError(
            f"lora.rank={lora.rank}: every matrix of the model has a side of {shape.hidden_size} "
            "(hidden_size) or fewer, so no change of one has a higher rank"
        )
    return Network(
        shape,
        config.param_dtype,
        config.compute_dtype,
        config.remat,
        config.scan_layers,
        config.attention,
        lora if lora.rank else None,
        lora.quantize,
        config.offload,
    )


def _weight(module: Any, name: str, init: Any, axes: Mapping[str, int]) -> Any:
    """A parameter of a module, with its logical axes and their sizes; an array or a `QArray`.

    Or a `Turned` kernel, whose shape is not the module's.
    """
    held = module.get_variable("params", name)
    if isinstance(held, Turned):
        return held
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(name, boxed, tuple(axes.values()), module.param_dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis; statistics in float32."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale_D = _weight(self, "scale", nn.initializers.ones, {"norm": x_BTD.shape[-1]})
        wide = x_BTD.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return scale_D.astype(x_BTD.dtype) * wide.astype(x_BTD.dtype)


class Linear(nn.Module):
    """x @ kernel (+ bias) over the last `len(inputs)` axes of x, and its adapter's part if any.

    `inputs` and `outputs` map logical axis names to sizes, e.g. {"embed": D} -> {"heads": N,
    "head_dim": H}; the kernel has their shapes joined.
    """

    network: Network
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    bias: bool = False

    @property
    def param_dtype(self) -> str:
        """Of kernel and bias."""
        return self.network.param_dtype

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        init = nn.initializers.normal(self.network.shape.initializer_range)
        kernel = _weight(self, "kernel", init, {**self.inputs, **self.outputs})
        y = multiply(x, kernel, len(self.inputs), (*self.inputs, *self.outputs))
        if self.bias:
            y = y + _weight(self, "bias", nn.initializers.zeros, self.outputs).astype(x.dtype)
        if self.network.lora and self.has_variable("lora", "a"):
            y = y + adapt(x, lora=self.network.lora, **self.variables["lora"])
        return checkpoint_name(y, self.name)


class Attention(nn.Module):
    """Grouped-query self-attention; how queries meet keys is a function that is passed in.

    Returns:
        The output, and what that function keeps.
    """

    network: Network

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"], meet: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        shape = self.network.shape
        linear = partial(Linear, self.network)
        width = {"embed": shape.hidden_size}
        heads = {"heads": shape.num_attention_heads, "head_dim": shape.head_dim}
        kv_heads = {"kv_heads": shape.num_key_value_heads, "head_dim": shape.head_dim}
        q_BTNH = linear(width, heads, bias=True, name="q")(x_BTD)
        k_BTKH = linear(width, kv_heads, bias=True, name="k")(x_BTD)
        v_BTKH = linear(width, kv_heads, bias=True, name="v")(x_BTD)
        frequencies = rope_frequencies(shape.head_dim, shape.rope_theta)
        q_BTNH = rotate(q_BTNH, positions_BT, frequencies)
        k_BTKH = rotate(k_BTKH, positions_BT, frequencies)
        q_BTNH = constrain(q_BTNH, "batch", "row", "act_heads", None)
        y_BTNH, kept = meet(q_BTNH, k_BTKH, v_BTKH)
        return linear(heads, width, name="o")(y_BTNH), kept


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    network: Network

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        shape = self.network.shape
        linear = partial(Linear, self.network)
        width, hidden = {"embed": shape.hidden_size}, {"mlp": shape.intermediate_size}
        gate_BTF = linear(width, hidden, name="gate")(x_BTD)
        up_BTF = linear(width, hidden, name="up")(x_BTD)
        y_BTF = constrain(nn.silu(gate_BTF) * up_BTF, "batch", "row", "act_mlp")
        return linear(hidden, width, name="down")(y_BTF)


class Block(nn.Module):
    """One layer; returns what `Attention` does."""

    network: Network

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"], meet: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        norm = partial(RMSNorm, self.network.shape.rms_norm_eps, self.network.param_dtype)
        x_BTD = constrain(x_BTD, "batch", "row", "act_embed")
        attention = Attention(self.network, name="attention")
        # Gathered once for all matmuls that read it.
        seen_BTD = constrain(norm(name="attention_norm")(x_BTD), "batch", "row", None)
        y_BTD, kept = attention(seen_BTD, positions_BT, meet)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "row", "act_embed")
        seen_BTD = constrain(norm(name="mlp_norm")(x_BTD), "batch", "row", None)
        x_BTD = x_BTD + Mlp(self.network, name="mlp")(seen_BTD)
        return constrain(x_BTD, "batch", "row", "act_embed"), kept


class Table(nn.Module):
    """A matrix with a row a vocabulary entry: the input embedding, or the output head."""

    network: Network
    axes: tuple[str, str]

    @property
    def param_dtype(self) -> str:
        """Of the table."""
        return self.network.param_dtype

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        shape = self.network.shape
        vocab, embed = self.axes
        size = {vocab: shape.vocab_size, embed: shape.hidden_size}
        return _weight(self, "table", nn.initializers.normal(shape.initializer_range), size)


def _init_boxed(network: Network, key: Array) -> tuple[Any, Any]:
    """One layer's and the other parameters, still boxed with their axes."""
    shape = network.shape
    x_BTD = jnp.zeros((1, 1, shape.hidden_size), network.compute_dtype)
    one_BT = jnp.zeros((1, 1), jnp.int32)
    keys = jax.random.split(key, 3)

    def init_layer(layer_key: Array) -> Any:
        meet = make_attend("dense", one_BT, None)
        return Block(network).init(layer_key, x_BTD, one_BT, meet)["params"]

    norm = RMSNorm(shape.rms_norm_eps, network.param_dtype)
    tied = shape.tie_word_embeddings
    lookup = ("vocab", "embed") if tied else ("vocab_lookup", "embed_lookup")
    rest = {
        "embed": Table(network, lookup).init(keys[0])["params"],
        "norm": norm.init(keys[0], x_BTD)["params"],
    }
    if not tied:
        rest["head"] = Table(network, ("vocab", "embed")).init(keys[1])["params"]
    return init_layer, {"key": keys[2], **rest}


def init_params(network: Network, key: Array) -> Params:
    """Random weights as HF draws them: normal of `initializer_range`, zero biases, unit norms.

    Returns:
        {"embed": {"table" [V, D]}, "layers": {...} each with a leading axis L,
        "norm": {"scale" [D]}, "head": {"table" [V, D]} unless tied}, and where the network has
        adapters "lora" (see `init_adapters`); kernels are quantised where it says so.
    """
    init_layer, rest = _init_boxed(network, key)
    layer_keys = jax.random.split(rest.pop("key"), network.shape.num_hidden_layers)
    layers = jax.vmap(lambda layer_key: nn.meta.unbox(init_layer(layer_key)))(layer_keys)
    params = {**nn.meta.unbox(rest), "layers": layers}
    if network.lora:
        params["lora"] = init_adapters(layers, network.lora, key)
        if network.lora.trained_tokens:
            params |= take_rows(params, jnp.arange(len(network.lora.trained_tokens)))
    if network.quantize:
        params["layers"] = quantize_layers(layers, network.quantize)
    return params


def abstract_params(network: Network) -> Params:
    """Shapes and dtypes of the weights, without allocating them."""
    return jax.eval_shape(partial(init_params, network), jax.random.key(0))


def param_axes(network: Network) -> Params:
    """The logical axes of every weight: the tree of `init_params`, its leaves tuples of names."""

    def boxes(key: Array) -> tuple[Any, Any]:
        init_layer, rest = _init_boxed(network, key)
        return init_layer(rest.pop("key")), rest

    layer, rest = jax.eval_shape(boxes, jax.random.key(0))

    def is_box(node: Any) -> bool:
        return isinstance(node, nn.LogicallyPartitioned)

    layers = jax.tree.map(lambda box: ("layers", *box.names), layer, is_leaf=is_box)
    axes = {**jax.tree.map(lambda box: box.names, rest, is_leaf=is_box), "layers": layers}
    if network.lora:
        axes["lora"] = adapter_axes(layers, network.lora)
        if network.lora.trained_tokens:
            axes |= row_axes(axes)
    if network.quantize:
        # Values and scales lie alike: the scales' axes are the same, some shorter.
        axes["layers"] = jax.tree.map(
            lambda leaf, names: jax.tree.map(lambda _: names, leaf),
            abstract_params(network)["layers"],
            layers,
            is_leaf=is_quantized,
        )
    return axes


def count_params(network: Network) -> int:
    """Number of weights, adapters not counted."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(network.base)))


def forward(
    network: Network,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    branch_ids_BT: Int[Array, "B T"] | None,
    positions_BT: Int[Array, "B T"],
    dropout_seed_B: UInt32[Array, "B"] | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states after the last norm, in the compute dtype; the ids are `make_attend`'s.

    Adapters act if `params` has them ("lora"), and with dropout if there are seeds for it.
    """
    x_BTD = embed(network, params, tokens_BT)
    meet = make_attend(network.attention, segment_ids_BT, branch_ids_BT, network.slots)
    stacked = layer_variables(params)
    if dropout_seed_B is not None:
        count = network.shape.num_hidden_layers
        stacked["lora"] = seed_dropout(stacked["lora"], count, dropout_seed_B)

    def layer(x_BTD: Array, variables: Params) -> tuple[Array, None]:
        return run_layer(network, variables, checkpoint_name(x_BTD, INPUT), positions_BT, meet)

    if network.remat != "none":
        layer = jax.checkpoint(
            layer,
            prevent_cse=not network.scan_layers,
            policy=make_policy(network.remat, network.offload),
        )
    if network.scan_layers:
        x_BTD, _ = jax.lax.scan(layer, x_BTD, stacked)
    else:
        for index in range(network.shape.num_hidden_layers):
            x_BTD, _ = layer(x_BTD, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
    return normalize(network, params, x_BTD)


def _gather(network: Network, weights: Params) -> Params:
    """A layer's weights as its matmuls read them, whole along fsdp.

    In the compute dtype; quantised ones stay so.
    """

    def one(axes: tuple[str, ...], leaf: Any) -> Any:
        if isinstance(leaf, Turned):
            return leaf  # of one device
        if not is_quantized(leaf) and leaf.dtype != network.compute_dtype:
            # Behind a barrier, and rounded before it is cast, or the compiler casts all layers
            # before the first one is computed and has the weights lie there twice.
            to = jnp.finfo(network.compute_dtype)
            leaf = jax.lax.reduce_precision(jax.lax.optimization_barrier(leaf), to.nexp, to.nmant)
            leaf = leaf.astype(network.compute_dtype)
        return jax.tree.map(lambda x: constrain(x, *gathered(axes[1:])), leaf)

    axes = param_axes(network.base)["layers"]
    return jax.tree.map(one, axes, weights, is_leaf=lambda node: isinstance(node, tuple))


def layer_variables(params: Params) -> dict[str, Params]:
    """All that a `Block` is applied with, stacked along a leading axis L."""
    return {"params": params["layers"]} | {key: params[key] for key in ("lora",) if key in params}


def run_layer(
    network: Network,
    variables: dict[str, Params],
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    meet: Attend,
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer with its share of `layer_variables`; also what `meet` keeps."""
    variables = {**variables, "params": _gather(network, variables["params"])}
    return cast(tuple[Array, Any], Block(network).apply(variables, x_BTD, positions_BT, meet))


def embed(network: Network, params: Params, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What the first layer reads: a row of the input table a token, in the compute dtype."""
    table_VD = find_table(params, "embed").astype(network.compute_dtype)
    x_BTD = constrain(table_VD, None, "act_embed_lookup")[tokens_BT]
    return constrain(x_BTD, "batch", "row", "act_embed_lookup")


def normalize(
    network: Network, params: Params, x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """The norm after the last layer."""
    norm = RMSNorm(network.shape.rms_norm_eps, network.param_dtype)
    return cast(Array, norm.apply({"params": params["norm"]}, x_BTD))


def head_table(params: Params) -> Float[Array, "V D"]:
    """The output head, one row a vocabulary entry; of a tied model the embedding itself."""
    return find_table(params, "head" if "head" in params else "embed")
