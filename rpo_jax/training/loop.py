"""The loop: steps, logs, checkpoints, a clean stop."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from rpo_jax.errors import Stopped, UserError
from rpo_jax.model.qwen2 import Params
from rpo_jax.training.checkpoint import save_state
from rpo_jax.training.diagnostics import Watch, make_term_gradients
from rpo_jax.training.distributed import all_should_stop
from rpo_jax.training.evaluation import put_batch
from rpo_jax.training.metrics import MetricLog, count_flops, measure_memory, peak_flops
from rpo_jax.training.run import read_fingerprints
from rpo_jax.training.state import TrainState, join_params
from rpo_jax.training.workload import Workload


def run_steps(
    work: Workload,
    step: Callable[..., tuple[TrainState, dict[str, Array]]],
    state: TrainState,
    frozen: Params,
    batches: Iterator[dict[str, np.ndarray]],
    evaluate: Callable[[Params], dict[str, float]],
    checkpoints: ocp.training.Checkpointer,
    log: MetricLog,
) -> TrainState:
    """Steps from `state.step` to `train.steps`; every step's metrics are logged.

    Metrics stay on the device until they are due, so that the host runs ahead of the device.

    Raises:
        UserError: a loss or gradient was not finite; names step and records. The state before it is
            not harmed, and what was saved before stays.
        Stopped: after a signal; the state is saved.
    """
    config, train = work.config, work.config.train
    done = int(state.step)
    pending: list[tuple[int, np.ndarray, dict[str, Array]]] = []
    meter, watch = _Meter(work), Watch()
    terms_every = config.rpo.term_gradients_every_steps if config.stage == "rpo" else 0
    term_gradients = make_term_gradients(work)
    with (
        catch_signals() as stop,
        tqdm(total=train.steps, initial=done, desc=config.name, unit="step", disable=None) as bar,
    ):
        while done < train.steps:
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
            last = done == train.steps or bool(stop)
            save = last or done % config.checkpoint.save_every_steps == 0
            look = train.eval_every_steps and done % train.eval_every_steps == 0
            if last or save or look or done % train.log_every_steps == 0:
                newest = _flush(pending, log, meter, watch)
                bar.set_postfix({k: f"{newest[k]:.4g}" for k in ("loss", "tokens_per_s")})
                if bar.disable:
                    _say(done, train.steps, newest)
                meter.start()
            if look and not last:
                heldout = heldout_names(evaluate(join_params(state.params, frozen)))
                log.write(done, heldout)
                watch.look(done, heldout)
                meter.start()
            if save:
                log.sync()  # a checkpoint is never ahead of its metrics
                save_state(checkpoints, state, read_fingerprints(config.folder))
                log.write(done, measure_memory())
            # Only where this step was saved: a signal that came since then waits for the next one.
            if save and stop:
                checkpoints.wait()
                raise Stopped(f"{stop[0].name}: stopped at step {done}, saved", stop[0])
    return state


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
            raise UserError(
                f"step {step}: loss {scalars['loss']} with gradient norm {scalars['grad_norm']} on "
                f"records {records[records >= 0].tolist()}; the step was refused, the last "
                "checkpoint is whole. Look at these records, or lower optim.learning_rate"
            )
        newest = scalars | (rates if step == pending[-1][0] else {})
        log.write(step, newest)
        watch.look(step, newest)
    pending.clear()
    return newest


def _say(step: int, steps: int, scalars: dict[str, float]) -> None:
    shown = ("loss", "dpo", "nll", "margin", "reward_accuracy", "grad_norm", "tokens_per_s")
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
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
