"""What a researcher wants to know of a preference run besides its loss."""

import dataclasses
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rpo_jax.model.qwen2 import Params
from rpo_jax.training.objective import Batch, Hyper, Objective
from rpo_jax.training.step import compute_gradients
from rpo_jax.training.workload import Workload

_FALLEN = (
    "chosen responses have become less likely than under the reference: raise rpo.alpha or lower "
    "optim.learning_rate"
)
_STUCK = (
    "the dpo term stands at ln 2, as if nothing were trained: raise optim.learning_rate; with "
    "adapters, look at how they begin and at the order of the devices"
)
# metric, what is wrong with it, how often in a row, the warning. Training batches differ, so it
# takes many of them; held-out pairs are always the same ones, and
# theirs is 0 at first, but for rounding.
_SIGNS: tuple[tuple[str, Callable[[float], bool], int, str], ...] = (
    ("chosen_log_ratio", lambda nats: nats < 0, 20, _FALLEN),
    ("heldout/chosen_log_ratio", lambda nats: nats < -1e-3, 1, _FALLEN),
    ("dpo", lambda nats: abs(nats - math.log(2)) < 1e-5, 20, _STUCK),
)


def make_term_gradients(work: Workload) -> Callable[..., dict[str, Array]]:
    """The jitted `(trained, frozen, hyper, batch) -> {"grad_norm_<term>", "grad_cosine_<a>_<b>"}`.

    Norms are those of the terms as they are logged: the NLL without alpha; a cosine below 0 says
    that a step along one term makes the other one worse. It costs a backward pass a term.
    """
    rpo = work.config.rpo
    names = [name for name in (rpo.preference, "nll") if name != "none"]

    def alone(name: str) -> Objective:
        return dataclasses.replace(work.objective, loss=lambda means, hyper: means[name])

    micro_batches = work.config.train.micro_batches

    def measure(trained: Params, frozen: Params, hyper: Hyper, batch: Batch) -> dict[str, Array]:
        grads = {
            name: compute_gradients(
                alone(name), micro_batches, trained, frozen, hyper, batch, work.row_sizes
            )[0]
            for name in names
        }
        norms = {name: optax.tree.norm(grad) for name, grad in grads.items()}
        return {f"grad_norm_{name}": norm for name, norm in norms.items()} | {
            f"grad_cosine_{a}_{b}": optax.tree.vdot(grads[a], grads[b])
            / jnp.maximum(norms[a] * norms[b], jnp.finfo(jnp.float32).tiny)
            for a, b in itertools.combinations(names, 2)
        }

    return jax.jit(measure)


class Watch:
    """Warns of what goes wrong in a preference run without stopping it, when it has lasted."""

    def __init__(self, run: str = "") -> None:
        """Of several runs that speak at once, which one it is."""
        self._whose = f"{run}: " if run else ""
        self._in_a_row: Counter[str] = Counter()

    def look(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the metrics of a step, or held-out ones."""
        for name, is_bad, patience, warning in _SIGNS:
            if name not in scalars:
                continue
            self._in_a_row[name] = self._in_a_row[name] + 1 if is_bad(scalars[name]) else 0
            if self._in_a_row[name] == patience:
                lasted = f", bad for {patience} measures in a row" if patience > 1 else ""
                logging.warning(
                    "warning: %sstep %d: %s is %.6g%s: %s",
                    self._whose,
                    step,
                    name,
                    scalars[name],
                    lasted,
                    warning,
                )
