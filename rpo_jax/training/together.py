"""Several policies in one program: adapters over one resident base, each with its own numbers.

Loss weights and learning rates are traced and adapters are small. K runs that differ in these and
in their seeds alone are one program, vmapped over the policies: the frozen weights are held,
gathered and read once for all. Each policy sees the batches that it would see alone, and takes the
steps that it would take.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
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
from rpo_jax.errors import Stopped, UserError
from rpo_jax.model.qwen2 import Params
from rpo_jax.sharding.mesh import compiler_options
from rpo_jax.sharding.rules import batch_sharding, replicated
from rpo_jax.training.checkpoint import save_state
from rpo_jax.training.loop import catch_signals, heldout_names
from rpo_jax.training.metrics import MetricLog
from rpo_jax.training.objective import Batch, Hyper
from rpo_jax.training.run import list_changes
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


def check_together(configs: Sequence[Config]) -> None:
    """Refuses runs that are not one program.

    Raises:
        UserError: says which field stands in the way.
    """
    first = configs[0]
    if not first.lora.rank:
        raise UserError("--together: lora.rank=0; whole models do not share a base: train apart")
    if first.stage != "rpo":
        raise UserError(f"--together: stage={first.stage!r}; policies are trained by stage='rpo'")
    if first.lora.dropout:
        raise UserError(
            f"--together: lora.dropout={first.lora.dropout}: its draws are built into a program by "
            "seed; 0 is wanted"
        )
    if first.rpo.reference != "stored":
        raise UserError(f"--together: rpo.reference={first.rpo.reference!r}: 'stored' is wanted")
    if first.exam.name:
        raise UserError(
            f"--together: exam.name={first.exam.name!r}: policies of one program take no exam "
            "while they train; let each take it afterwards, by `rpo_jax.evaluate`"
        )
    if first.data.row_sizes > 1:
        raise UserError(
            f"--together: data.row_sizes={first.data.row_sizes}: policies of one program compute "
            "rows of one length; 1 is wanted"
        )
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
    works: Sequence[Workload],
    steps: Callable[..., tuple[TrainState, dict[str, Array]]],
    state: TrainState,
    frozen: Params,
    batches: Sequence[Iterator[Rows]],
    evaluate: Callable[[Params, Hyper], dict[str, float]],
    take: Callable[[TrainState, int], TrainState],
    checkpoints: ocp.training.Checkpointer,
    logs: Sequence[MetricLog],
) -> TrainState:
    """`loop.run_steps` for several policies: steps to `train.steps`, each policy's metrics logged.

    Raises:
        UserError: a policy's loss or gradient was not finite; names it, and the step.
        Stopped: after a signal; the state is saved.
    """
    config, train = works[0].config, works[0].config.train
    hyper = jax.tree.map(lambda *values: jnp.stack(values), *(work.hyper for work in works))
    done = int(state.step)
    pending: list[tuple[int, dict[str, Array]]] = []

    def flush() -> None:
        for step, metrics in jax.device_get(pending):
            for number, log in enumerate(logs):
                scalars = {name: float(values[number]) for name, values in metrics.items()}
                if not scalars.pop("finite"):
                    raise UserError(
                        f"step {step}: {works[number].config.name}: loss {scalars['loss']} with "
                        f"gradient norm {scalars['grad_norm']}; lower its optim.learning_rate, or "
                        "leave the point out. What is saved is from before it"
                    )
                log.write(step, scalars)
        pending.clear()

    with (
        catch_signals() as stop,
        tqdm(
            total=train.steps,
            initial=done,
            desc=f"{len(works)} policies",
            unit="step",
            disable=None,
        ) as bar,
    ):
        while done < train.steps:
            placed = put_batches([next(own) for own in batches], works[0])
            state, metrics = steps(state, frozen, hyper, placed)
            done += 1
            bar.update()
            pending.append((done, metrics))
            last = done == train.steps or bool(stop)
            save = last or done % config.checkpoint.save_every_steps == 0
            look = train.eval_every_steps and done % train.eval_every_steps == 0
            if save or look or done % train.log_every_steps == 0:
                flush()
                if bar.disable:
                    logging.info("step %d/%d of %d policies", done, train.steps, len(works))
            if look and not last:
                log_heldout(works, take, state, frozen, evaluate, logs)
            if save:
                save_state(checkpoints, state)
            if save and stop:
                checkpoints.wait()
                raise Stopped(f"{stop[0].name}: stopped at step {done}, saved", stop[0])
    return state


def log_heldout(
    works: Sequence[Workload],
    take: Callable[[TrainState, int], TrainState],
    state: TrainState,
    frozen: Params,
    evaluate: Callable[[Params, Hyper], dict[str, float]],
    logs: Sequence[MetricLog],
) -> None:
    """Measures each policy on held-out records, where that is not logged yet."""
    step = int(state.step)
    for number, (work, log) in enumerate(zip(works, logs, strict=True)):
        if not log.has(step, "heldout/loss"):
            params = join_params(take(state, number).params, frozen)
            log.write(step, heldout_names(evaluate(params, work.hyper)))


def digest_together(configs: Sequence[Config]) -> str:
    """Tells one set of policies from another: what is unfinished goes on only as it began."""
    text = json.dumps([to_dict(config) for config in configs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
