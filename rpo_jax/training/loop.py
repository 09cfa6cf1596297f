"""The loop: steps, logs, checkpoints, a clean stop."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from rpo_jax.errors import DivergedError, Stopped
from rpo_jax.model.qwen2 import Params
from rpo_jax.training.checkpoint import save_state
from rpo_jax.training.diagnostics import Watch, make_term_gradients
from rpo_jax.training.distributed import all_should_stop
from rpo_jax.training.evaluation import put_batch
from rpo_jax.training.metrics import MetricLog, count_flops, measure_memory, peak_flops
from rpo_jax.training.run import read_fingerprints
from rpo_jax.training.state import TrainState, join_params
from rpo_jax.training.workload import Workload


@dataclass(frozen=True)
class Look:
    """Something that is measured of the weights: before training, on the way, and at its end.

    Attributes:
        every_steps: on the way; 0: never.
        measure: from the whole weights and their step to scalars, by the names they are logged as.
        logged: one of these names, which tells that a step was looked at.
        selects: another, by which the best checkpoint is kept (higher is better): the weights of
            each look are then saved. "": none.
    """

    every_steps: int
    measure: Callable[[Params, int], dict[str, float]]
    logged: str
    selects: str = ""


def run_steps(
    work: Workload,
    step: Callable[..., tuple[TrainState, dict[str, Array]]],
    state: TrainState,
    frozen: Params,
    batches: Iterator[dict[str, np.ndarray]],
    looks: Sequence[Look],
    checkpoints: ocp.training.Checkpointer,
    log: MetricLog,
) -> TrainState:
    """Steps from `state.step` to `train.steps`; every step's metrics are logged.

    A step is looked at before it is saved; one that was saved in a hurry, after a signal, when the
    run goes on.

    Metrics stay on the device until they are due, so that the host runs ahead of the device.

    Raises:
        DivergedError: a loss or gradient was not finite; names step and records. The state before
            it is not harmed, and what was saved before stays.
        Stopped: after a signal; the state is saved.
    """
    config, train = work.config, work.config.train
    done = int(state.step)
    pending: list[tuple[int, np.ndarray, dict[str, Array]]] = []
    meter, watch = _Meter(work), Watch()
    terms_every = config.rpo.term_gradients_every_steps if config.stage == "rpo" else 0
    term_gradients = make_term_gradients(work)

    def look() -> dict[str, float]:
        """Logs what is due of the state; returns the scores by which it may be the best."""
        scores: dict[str, float] = {}
        for one in looks:
            due = done in (0, train.steps) or is_due(done, one.every_steps)
            if not due or log.has(done, one.logged):
                continue
            found = one.measure(join_params(state.params, frozen), done)
            log.write(done, found)
            watch.look(done, found)
            meter.start()
            scores |= {one.selects: found[one.selects]} if one.selects else {}
        return scores

    with (
        catch_signals() as stop,
        tqdm(total=train.steps, initial=done, desc=config.name, unit="step", disable=None) as bar,
    ):
        look()  # at step 0, and where a run was stopped before it looked
        stops = False
        while done < train.steps and not stops:
            batch = next(batches)
            placed = put_batch(batch, work.mesh)
            if terms_every and (done + 1) % terms_every == 0:
                terms = term_gradients(state.params, frozen, work.hyper, placed)
                log.write(done + 1, _to_floats(terms))
            state, metrics = step(state, frozen, work.hyper, placed)
            done += 1
            bar.update()
            pending.append((done, batch["record_index"], metrics))
            meter.add(batch)
            if all_should_stop(done):
                stop.append(signal.SIGTERM)
            stops = bool(stop)  # a signal from here on waits for the next step, or the end
            last = done == train.steps
            save = last or stops or is_due(done, config.checkpoint.save_every_steps)
            looks_due = any(is_due(done, one.every_steps) for one in looks)
            if save or looks_due or is_due(done, train.log_every_steps):
                newest = _flush(pending, log, meter, watch)
                bar.set_postfix({k: f"{newest[k]:.4g}" for k in ("loss", "tokens_per_s")})
                if bar.disable:
                    _say(done, train.steps, newest)
                meter.start()
            scores = {} if stops else look()
            if save or scores:
                log.sync()  # a checkpoint is never ahead of its metrics
                save_state(checkpoints, state, read_fingerprints(config.folder), scores)
                log.write(done, measure_memory())
        if stop:
            checkpoints.wait()
            raise Stopped(f"{stop[0].name}: stopped at step {done}, saved", stop[0])
    return state


def is_due(step: int, every_steps: int) -> bool:
    """Whether a step is one of every so many; 0 steps are never."""
    return every_steps > 0 and step % every_steps == 0


def heldout_names(means: dict[str, float]) -> dict[str, float]:
    """The means under the names they are logged with."""
    return {f"heldout/{name}": value for name, value in means.items()}


def _to_floats(scalars: dict[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in scalars.items()}


class _Meter:
    """Useful tokens and FLOPs a second since the last look."""

    def __init__(self, work: Workload):
        self._network = work.network
        self._rows = work.config.train.batch_rows
        self._peak = peak_flops(list(work.mesh.devices.flat))
        self.start()

    def start(self) -> None:
        self._since, self._tokens, self._flops = time.perf_counter(), 0.0, 0.0

    def add(self, batch: dict[str, np.ndarray]) -> None:
        share = self._rows / len(batch["segment_ids"])  # other processes have rows like these
        self._tokens += float((batch["segment_ids"] > 0).sum()) * share
        self._flops += count_flops(self._network, batch) * share

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        rates = {"tokens_per_s": self._tokens / seconds, "tflops": self._flops / seconds / 1e12}
        if self._peak:
            rates["mfu"] = self._flops / seconds / self._peak
        return rates


def _flush(
    pending: list[tuple[int, np.ndarray, dict[str, Array]]],
    log: MetricLog,
    meter: _Meter,
    watch: Watch,
) -> dict[str, float]:
    """Fetches and logs what is pending; the newest step gets the rates too."""
    fetched = jax.device_get([metrics for _, _, metrics in pending])
    rates = meter.read()
    for (step, records, _), metrics in zip(pending, fetched, strict=True):
        scalars = {name: float(value) for name, value in metrics.items() if name != "finite"}
        if not metrics["finite"]:
            raise DivergedError(
                f"step {step}: loss {scalars['loss']} with gradient norm {scalars['grad_norm']} on "
                f"records {records[records >= 0].tolist()}; the step was refused, what is "
                "saved is from before it. Lower optim.learning_rate, or look at these records"
            )
        newest = scalars | (rates if step == pending[-1][0] else {})
        log.write(step, newest)
        watch.look(step, newest)
    pending.clear()
    return newest


def _say(step: int, steps: int, scalars: dict[str, float]) -> None:
    terms = ("loss", "dpo", "ipo", "simpo", "orpo", "nll")
    pairs = ("margin", "reward_accuracy", "preference_accuracy")
    shown = (*terms, *pairs, "grad_norm", "tokens_per_s")
    text = "  ".join(f"{name} {scalars[name]:.4g}" for name in shown if name in scalars)
    logging.info("step %d/%d  %s", step, steps, text)


@contextlib.contextmanager
def catch_signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGTERM or a first Ctrl-C is put into; a second one acts at once.

    Where there are several processes the list stays empty: jax takes the SIGTERM that comes to one
    of them, which a Ctrl-C is made into, and `all_should_stop` tells them all.
    """
    received: list[signal.Signals] = []

    def note(number: int, frame: Any) -> None:
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.signal(number, previous[number])
            return
        received.append(signal.Signals(number))
        for each in previous:
            signal.signal(each, previous[each])
        logging.warning("%s: stopping after this step, with a checkpoint", received[0].name)

    several = jax.process_count() > 1
    caught: list[int] = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    previous = {number: signal.signal(number, note) for number in caught}
    try:
        yield received
    except DivergedError as error:  # others might go on after it
        if not received:
            raise
        raise Stopped(f"{received[0].name}: {error}", received[0]) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
