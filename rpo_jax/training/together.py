"""Several policies in one program: adapters over one resident base, each with its own numbers.

Loss weights and learning rates are traced and adapters are small. K runs that differ in these and
in their seeds alone are one program, vmapped over the policies: the frozen weights are held,
gathered and read once for all. Each policy sees the batches that it would see alone, and takes the
steps that it would take.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from rpo_jax.config import Config, to_dict
from rpo_jax.errors import DivergedError, Stopped, UserError
from rpo_jax.model.qwen2 import Params
from rpo_jax.sharding.mesh import compiler_options
from rpo_jax.sharding.rules import batch_sharding, replicated
from rpo_jax.training.checkpoint import save_state
from rpo_jax.training.diagnostics import Watch
from rpo_jax.training.loop import catch_signals, heldout_names, is_due
from rpo_jax.training.metrics import MetricLog
from rpo_jax.training.objective import Batch, Hyper
from rpo_jax.training.run import digest_settings, list_changes
from rpo_jax.training.state import TrainState, join_params
from rpo_jax.training.step import define_step, frozen_places
from rpo_jax.training.workload import Rows, Workload

# What policies of one program may differ in: traced numbers, and what makes batches and adapters.
OWN = (
    "name",
    "seed",
    "rpo.alpha",
    "rpo.beta",
    "rpo.gamma",
    "rpo.label_smoothing",
    "optim.learning_rate",
)


# Field, what it must be, and why, told where it is not.
_WANTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("lora.rank", lambda rank: rank > 0, "whole models do not share a base: train apart"),
    ("stage", lambda stage: stage == "rpo", "policies are trained by stage='rpo'"),
    (
        "lora.dropout",
        lambda share: share == 0,
        "its draws are built into a program by seed; 0 is wanted",
    ),
    ("rpo.reference", lambda how: how == "stored", "'stored' is wanted"),
    ("rpo.term_gradients_every_steps", lambda steps: steps == 0, "0 is wanted, or train apart"),
    (
        "exam.name",
        lambda name: not name,
        "policies of one program take no exam while they train; let each take it afterwards, by "
        "`rpo_jax.evaluate`",
    ),
    (
        "data.row_sizes",
        lambda sizes: sizes <= 1,
        "policies of one program compute rows of one length; 1 is wanted",
    ),
    (
        "log.wandb_project",
        lambda project: not project,
        "W&B has one run in a process: leave it empty, or train apart",
    ),
)


@dataclass(frozen=True)
class Policy:
    """One of the runs that a program trains: what it computes, where it logs, what watches it."""

    work: Workload
    log: MetricLog
    watch: Watch


def check_together(configs: Sequence[Config]) -> None:
    """Refuses runs that are not one program.

    Raises:
        UserError: says which field stands in the way.
    """
    first = configs[0]
    for name, is_fine, why in _WANTED:
        value = attrgetter(name)(first)
        if not is_fine(value):
            raise UserError(f"--together: {name}={value!r}: {why}")
    for config in configs[1:]:
        for name, ours, theirs in list_changes(to_dict(first), to_dict(config)):
            if name not in OWN:
                raise UserError(
                    f"--together: {first.name} has {name}={ours!r} and {config.name} {theirs!r}; "
                    f"policies of one program differ in {', '.join(OWN[1:])} alone"
                )


def stack_abstract(state: TrainState, count: int) -> TrainState:
    """The abstract state of `count` policies: a new first axis, which is not cut."""

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = leaf.sharding
        assert isinstance(place, NamedSharding)
        place = NamedSharding(place.mesh, P(None, *place.spec))
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=place)

    params, optimizer = jax.tree.map(stack, (state.params, state.optimizer))
    return TrainState(state.step, params, optimizer)


def stack_states(states: Sequence[TrainState], abstract: TrainState) -> TrainState:
    """The states of policies that stand at the same step as one, laid out as `abstract` says."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def stack(*states: TrainState) -> TrainState:
        params, optimizer = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *((s.params, s.optimizer) for s in states)
        )
        return TrainState(states[0].step, params, optimizer)

    return jax.jit(stack, out_shardings=places)(*states)


def make_take(abstract: TrainState) -> Callable[[TrainState, int], TrainState]:
    """A function from a stacked state and a number to that policy's state, placed as `abstract`."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def take(state: TrainState, number: Array) -> TrainState:
        params, optimizer = jax.tree.map(lambda x: x[number], (state.params, state.optimizer))
        return TrainState(state.step, params, optimizer)

    return jax.jit(take, out_shardings=places)


def make_steps(
    work: Workload, tx: optax.GradientTransformation, abstract: TrainState, at_once: int = 0
) -> jax.stages.Wrapped:
    """The step of all policies, jitted; the old state is donated.

    `(state, frozen, hyper, batch) -> (state, metrics)` as in `step.define_step`, where all but the
    step's number and `frozen` has a first axis of policies. So many of them are computed `at_once`,
    all if it is 0; the fewer, the less memory their activations take.
    """
    step = define_step(work, tx)
    count = jax.tree.leaves(abstract.params)[0].shape[0]

    def steps(
        state: TrainState, frozen: Params, hyper: Hyper, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        def one(own: tuple[Params, Any, Hyper, Batch]) -> tuple[Params, Any, dict[str, Array]]:
            params, optimizer, hyper, batch = own
            new, metrics = step(TrainState(state.step, params, optimizer), frozen, hyper, batch)
            return new.params, new.optimizer, metrics

        own = (state.params, state.optimizer, hyper, batch)
        new = jax.lax.map(one, own, batch_size=min(at_once or count, count))
        return TrainState(state.step + 1, new[0], new[1]), new[2]

    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = replicated(work.mesh)
    rows = _stacked_rows(work)
    return jax.jit(
        steps,
        in_shardings=(places, frozen_places(work), everywhere, rows),
        out_shardings=(places, everywhere),
        donate_argnums=0,
        compiler_options=compiler_options(work.mesh),
    )


def _stacked_rows(work: Workload) -> NamedSharding:
    return NamedSharding(work.mesh, P(None, *batch_sharding(work.mesh).spec))


def put_batches(batches: Sequence[Rows], work: Workload) -> Batch:
    """A batch of each policy as one, on the mesh."""
    place = _stacked_rows(work)
    return {
        name: jax.make_array_from_process_local_data(
            place, np.stack([batch[name] for batch in batches])
        )
        for name in batches[0]
    }


def run_together(
    policies: Sequence[Policy],
    steps: Callable[..., tuple[TrainState, dict[str, Array]]],
    state: TrainState,
    frozen: Params,
    batches: Sequence[Iterator[Rows]],
    evaluate: Callable[[Params, Hyper], dict[str, float]],
    take: Callable[[TrainState, int], TrainState],
    checkpoints: ocp.training.Checkpointer,
) -> tuple[TrainState, dict[int, str]]:
    """`loop.run_steps` for several policies: steps to `train.steps`, each policy's metrics logged.

    A policy whose numbers are not finite is left behind, and the others go on. Of a state that is
    taken up again these are the policies without a loss at its step.

    Returns:
        The state, and by number the policies that were left behind, each with a reason.

    Raises:
        Stopped: after a signal; the state is saved.
    """
    config, train = policies[0].work.config, policies[0].work.config.train
    hyper = jax.tree.map(lambda *values: jnp.stack(values), *(one.work.hyper for one in policies))
    settings = name_settings([one.work.config for one in policies])
    done = int(state.step)
    left = {
        number: f"was left behind before step {done}, see its log.txt"
        for number, one in enumerate(policies)
        if done and not one.log.has(done, "loss")
    }
    pending: list[tuple[int, dict[str, Array]]] = []

    def leave(number: int, reason: str) -> None:
        left[number] = reason
        logging.warning("warning: %s: %s", policies[number].work.config.name, reason)

    def write(number: int, step: int, scalars: dict[str, float]) -> None:
        policies[number].log.write(step, scalars)
        policies[number].watch.look(step, scalars)

    def flush() -> None:
        for step, metrics in jax.device_get(pending):
            for number in going_on():
                scalars = {name: float(values[number]) for name, values in metrics.items()}
                if scalars.pop("finite"):
                    write(number, step, scalars)
                else:
                    told = f"loss {scalars['loss']} with gradient norm {scalars['grad_norm']}"
                    leave(number, f"step {step}: {told}; lower its optim.learning_rate")
        pending.clear()

    def look() -> None:
        if done not in (0, train.steps) and not is_due(done, train.eval_every_steps):
            return
        for number in going_on():
            if policies[number].log.has(done, "heldout/loss"):
                continue
            params = join_params(take(state, number).params, frozen)
            try:
                found = evaluate(params, policies[number].work.hyper)
            except DivergedError as error:
                leave(number, f"step {done}: {error}; lower its optim.learning_rate")
            else:
                write(number, done, heldout_names(found))

    def going_on() -> list[int]:
        return [number for number in range(len(policies)) if number not in left]

    with (
        catch_signals() as stop,
        tqdm(
            total=train.steps,
            initial=done,
            desc=f"{len(policies)} policies",
            unit="step",
            disable=None,
        ) as bar,
    ):
        look()  # at step 0, and where it was stopped before it looked
        stops = False
        while done < train.steps and going_on() and not stops:
            placed = put_batches([next(own) for own in batches], policies[0].work)
            state, metrics = steps(state, frozen, hyper, placed)
            done += 1
            bar.update()
            pending.append((done, metrics))
            stops = bool(stop)  # a signal from here on waits for the next step, or the end
            last = done == train.steps
            save = last or stops or is_due(done, config.checkpoint.save_every_steps)
            looks = is_due(done, train.eval_every_steps)
            if save or looks or is_due(done, train.log_every_steps):
                flush()
                if bar.disable:
                    logging.info("step %d/%d of %d policies", done, train.steps, len(policies))
            if not stops:
                look()
            if save:
                for one in policies:
                    one.log.sync()  # a checkpoint is never ahead of its metrics
                save_state(checkpoints, state, settings)
        if stop:
            checkpoints.wait()
            told = "saved" if going_on() else "where all had diverged"
            raise Stopped(f"{stop[0].name}: stopped at step {done}, {told}", stop[0])
    return state, left


def name_settings(configs: Sequence[Config]) -> dict[str, str]:
    """What a run of several policies is a run of, in order: the settings of each, by its name."""
    return {config.name: digest_settings(config) for config in configs}


def digest_shared(config: Config) -> str:
    """Tells programs of several policies apart."""
    return digest_settings(config, OWN)[:8]
