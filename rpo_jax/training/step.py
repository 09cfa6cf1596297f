"""The training step and its forward-only twin: pure functions, jitted by their makers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, UInt32

from rpo_jax.data.packing import Size
from rpo_jax.data.rows import TARGET_ARRAYS, TOKEN_ARRAYS
from rpo_jax.losses.token_logps import token_divergences
from rpo_jax.model.qwen2 import Params, head_table
from rpo_jax.sharding.mesh import compiler_options
from rpo_jax.sharding.rules import batch_sharding, replicated
from rpo_jax.training.objective import (
    Batch,
    Hyper,
    Objective,
    Sums,
    divide,
    make_projection,
    target_logps,
    target_states,
)
from rpo_jax.training.optim import clip_factor, learning_rate_fraction
from rpo_jax.training.state import TrainState, abstract_weights, join_params, split_params
from rpo_jax.training.workload import Workload


def split_rows(batch: Batch, parts: int) -> Batch:
    """[B, ...] to [parts, B / parts, ...]; part i takes every parts-th row.

    Rows are dealt out in turn so that each device keeps the rows it has.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )


def cut_rows(batch: Batch, size: Size) -> Batch:
    """The first tokens and targets of each row."""
    lengths = dict.fromkeys(TOKEN_ARRAYS, size.tokens) | dict.fromkeys(TARGET_ARRAYS, size.targets)
    return {name: x[:, : lengths[name]] if name in lengths else x for name, x in batch.items()}


def choose_size(batch: Batch, sizes: Sequence[Size]) -> Array:
    """0 where the rows are empty, else 1 + the place of the least size that holds them all."""
    tokens = jnp.max(jnp.sum(batch["segment_ids"] > 0, axis=1))
    targets = jnp.max(jnp.sum(batch["target_mask"] > 0, axis=1))
    is_full = [(tokens > size.tokens) | (targets > size.targets) for size in sizes[:-1]]
    return jnp.sum(jnp.array([tokens > 0, *is_full]), dtype=jnp.int32)


def compute_gradients(
    objective: Objective,
    micro_batches: int,
    trained: Params,
    frozen: Params,
    hyper: Hyper,
    batch: Batch,
    row_sizes: Sequence[Size] = (),
) -> tuple[Params, dict[str, Array]]:
    """Gradients (float32) of the trained weights, and means, of the global batch.

    One micro-batch is computed after the other. With `row_sizes`, each in the least of them that
    holds its rows, and an empty one not at all; their tokens and targets must then lie at the
    rows' beginnings.
    """
    counts = objective.counts(batch)

    def loss(trained: Params, part: Batch) -> tuple[Array, Sums]:
        sums = objective.sums(join_params(trained, frozen), part, hyper)
        return objective.loss(divide(sums, counts), hyper), sums

    if micro_batches == 1 and not row_sizes:
        grads, sums = jax.grad(loss, has_aux=True)(trained, batch)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), divide(sums, counts)

    parts = split_rows(batch, micro_batches)
    first = jax.tree.map(lambda x: x[0], parts)
    sums_shape = jax.eval_shape(loss, trained, first)[1]
    zero_grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    zero_sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums_shape)

    def add(carry: tuple[Params, Sums], part: Batch) -> tuple[Params, Sums]:
        new = jax.grad(loss, has_aux=True)(trained, part)
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, new)

    def add_cut(carry: tuple[Params, Sums], part: Batch) -> tuple[Params, Sums]:
        cuts = [lambda part, size=size: add(carry, cut_rows(part, size)) for size in row_sizes]
        return jax.lax.switch(choose_size(part, row_sizes), [lambda _: carry, *cuts], part)

    add_part = add_cut if row_sizes else add
    (grads, sums), _ = jax.lax.scan(
        lambda carry, part: (add_part(carry, part), None), (zero_grads, zero_sums), parts
    )
    return grads, divide(sums, counts)


Step = Callable[[TrainState, Params, Hyper, Batch], tuple[TrainState, dict[str, Array]]]


def define_step(work: Workload, tx: optax.GradientTransformation) -> Step:
    """The pure step `(state, frozen, hyper, batch) -> (state, metrics)`.

    `frozen` are the weights that are not trained, {} if all are. Gradients are clipped by
    `optim.clip_norm` before `tx` sees them.

    Metrics are float32 scalars: the objective's means, `loss`, `grad_norm` before clipping,
    `learning_rate`, and `finite`. Where loss or gradient is not finite, `finite` is 0 and the state
    comes back unchanged: a bad batch costs nothing but its own step.
    """
    objective, config = work.objective, work.config

    def step(
        state: TrainState, frozen: Params, hyper: Hyper, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        if config.lora.dropout:
            batch = batch | {
                "dropout_seed": draw_dropout_seeds(config.seed, state.step, len(batch["tokens"]))
            }
        grads, means = compute_gradients(
            objective,
            config.train.micro_batches,
            state.params,
            frozen,
            hyper,
            batch,
            work.row_sizes,
        )
        loss = objective.loss(means, hyper)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        fraction = learning_rate_fraction(config.optim, config.train.steps, state.step)
        rate = hyper["learning_rate"] * fraction

        def take(state: TrainState) -> TrainState:
            factor = clip_factor(config.optim, grad_norm)
            clipped = jax.tree.map(lambda grad: grad * factor, grads)
            updates, optimizer = tx.update(clipped, state.optimizer, state.params)
            params = jax.tree.map(
                lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates
            )
            return TrainState(state.step + 1, params, optimizer)

        def choose(state: TrainState) -> TrainState:
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), take(state), state)

        # On CPU a choice between old and new values would hold a copy of the old ones. On a TPU
        # it is fused with the update, and a branch would hold one: arrays lie in it as it likes.
        new = jax.lax.platform_dependent(
            state,
            cpu=lambda state: jax.lax.cond(finite, take, lambda state: state, state),
            default=choose,
        )
        return new, means | {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "finite": finite.astype(jnp.float32),
        }

    return step


def make_step(
    work: Workload, tx: optax.GradientTransformation, abstract: TrainState
) -> jax.stages.Wrapped:
    """The step (see `define_step`), jitted; the old state is donated."""
    state_places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = replicated(work.mesh)
    return jax.jit(
        define_step(work, tx),
        in_shardings=(state_places, frozen_places(work), everywhere, batch_sharding(work.mesh)),
        out_shardings=(state_places, everywhere),
        donate_argnums=0,
        compiler_options=compiler_options(work.mesh),
    )


def frozen_places(work: Workload) -> Params:
    """Where the weights lie that are not trained."""
    _, frozen = split_params(abstract_weights(work.network, work.mesh))
    return jax.tree.map(lambda leaf: leaf.sharding, frozen)


def draw_dropout_seeds(seed: int, step: Array, rows: int) -> UInt32[Array, "B"]:
    """A number for each row of the global batch; the same for any cut of it."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.bits(key, (rows,))


def make_measure(work: Workload, abstract: Params) -> jax.stages.Wrapped:
    """The jitted forward-only twin of the step: sums and counts, to be added over batches."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = replicated(work.mesh)
    return jax.jit(
        lambda params, hyper, batch: (
            work.objective.sums(params, batch, hyper),
            work.objective.counts(batch),
        ),
        in_shardings=(places, everywhere, batch_sharding(work.mesh)),
        out_shardings=everywhere,
    )


def make_score(work: Workload, abstract: Params) -> jax.stages.Wrapped:
    """The jitted reference pass `(params, batch) -> log-probabilities [B, M]` of the targets."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        lambda params, batch: target_logps(
            work.row_network, params, batch, make_projection(work.config)
        ),
        in_shardings=(places, batch_sharding(work.mesh)),
        out_shardings=replicated(work.mesh),
        compiler_options=compiler_options(work.mesh),
    )


def make_divergence(work: Workload) -> jax.stages.Wrapped:
    """The jitted `(params, whole, batch) -> (sum of KL(params || whole) in nats, targets)`.

    `params` are a run's own weights, `whole` ones without adapters; see `token_divergences`.
    """

    def measure(params: Params, whole: Params, batch: Batch) -> tuple[Array, Array]:
        kl_BM = token_divergences(
            target_states(work.row_network, params, batch),
            target_states(work.row_network.base, whole, batch),
            head_table(params),
            head_table(whole),
            make_projection(work.config),
        )
        mask_BM = batch["target_mask"]
        return jnp.sum(kl_BM * (mask_BM > 0)), jnp.sum(mask_BM > 0)

    return jax.jit(measure)
