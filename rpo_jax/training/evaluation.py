"""Forward passes over whole record sets: held-out measures, and the reference of RPO."""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from rpo_jax.data.loader import Record
from rpo_jax.data.records import Records
from rpo_jax.errors import DivergedError, UserError
from rpo_jax.model.qwen2 import Params
from rpo_jax.sharding.rules import batch_sharding
from rpo_jax.training.distributed import agree, wait_for_all
from rpo_jax.training.objective import Batch, Hyper
from rpo_jax.training.reference import (
    Reference,
    check_reference,
    compute_reference,
    find_reference,
)
from rpo_jax.training.state import fingerprint_params, split_params, with_shardings
from rpo_jax.training.step import make_divergence, make_measure, make_score
from rpo_jax.training.workload import Workload, heldout_batches
from rpo_jax.writing import write_json

REFERENCE_NOTE = "reference.json"  # in a run's folder


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """The rows of a global batch that this process holds (`find_own_rows`), put on the mesh."""
    place = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, value) for name, value in batch.items()
    }


def make_evaluate(
    work: Workload,
    abstract: Params,
    records: Records,
    reference: Reference | None,
    general: Records | None = None,
) -> Callable[..., dict[str, float]]:
    """A function from weights to held-out means over the first `train.eval_rows` records.

    Its second argument, by default `work.hyper`, are the weights of the loss. It adds up in
    float64; nothing to predict is a UserError, a mean that is not finite a DivergedError. With
    `general` text it also measures `general_nll`, the nats/token there.
    """
    measure = make_measure(work, abstract)

    def evaluate(params: Params, hyper: Hyper = work.hyper) -> dict[str, float]:
        means = measure_set(params, hyper, records, reference)
        if general is not None:
            means["general_nll"] = measure_set(params, hyper, general, None)["nll"]
        return means

    def measure_set(
        params: Params, hyper: Hyper, records: Records, reference: Reference | None
    ) -> dict[str, float]:
        sums: dict[tuple[str, str], float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for batch in heldout_batches(work, records, reference, work.config.train.eval_rows):
            found = jax.device_get(measure(params, hyper, put_batch(batch, work.mesh)))
            for divisor, group in found[0].items():
                for name, value in group.items():
                    sums[divisor, name] += float(value)
            for divisor, count in found[1].items():
                counts[divisor] += float(count)
        if not all(counts.values()):
            raise UserError(f"{records.directory}: nothing to predict, {dict(counts)}")
        means = {name: total / counts[divisor] for (divisor, name), total in sums.items()}
        means["loss"] = float(work.objective.loss(means, hyper))
        if not np.isfinite(list(means.values())).all():
            raise DivergedError(f"{records.directory}: a held-out mean is not finite: {means}")
        return means

    return evaluate


def measure_divergence(work: Workload, records: Records, params: Params, whole: Params) -> float:
    """KL of a run's own weights from other, whole ones, a mean over held-out targets, nats/token.

    Raises:
        UserError: it is not finite.
    """
    measure = make_divergence(work)
    total = count = 0.0
    for batch in heldout_batches(work, records, None, work.config.train.eval_rows):
        found = jax.device_get(measure(params, whole, put_batch(batch, work.mesh)))
        total, count = total + float(found[0]), count + float(found[1])
    if not np.isfinite(total):
        raise UserError(f"{records.directory}: the divergence is not finite")
    return total / max(count, 1.0)


def find_references(
    work: Workload,
    folder: Path,
    record_sets: list[Records],
    step: int,
    params: Params,
    first: Callable[[], Params],
) -> list[Reference | None]:
    """The reference log-probabilities of each record set: stored ones, or computed now.

    The reference is the model that the run starts from: `params` themselves at step 0, else
    `first()`, called only if something has to be computed. At step 0 a few pairs of what is stored
    are computed again: see `check_reference`.

    Args:
        work: the stage; one without a reference gets None for each set.
        folder: of the run; `reference.json` there keeps the digest of the reference's weights, so
            that a resumed run finds its reference without loading them.
        record_sets: of preference pairs.
        step: where the run stands.
        params: the weights it has there.
        first: makes the weights it had at step 0 once more.
    """
    if work.config.stage != "rpo" or not work.config.rpo.stores_reference:
        return [None for _ in record_sets]
    data = work.config.data
    abstract = with_shardings(params, jax.tree.map(lambda leaf: leaf.sharding, params))

    note = folder / REFERENCE_NOTE

    def identify(reference: Params) -> str:
        # New adapters change nothing: whatever their seed, the reference is the model under them.
        is_new = work.config.lora.rank and work.config.lora.previous == "merge"
        return fingerprint_params(split_params(reference)[1] if is_new else reference)

    @functools.cache
    def reference_params() -> Params:
        if step == 0:
            return params
        origin = first()
        if note.is_file() and json.loads(note.read_text())["weights"] != identify(origin):
            raise UserError(
                f"{work.config.origin} is not the model that {folder} started from: it was trained "
                "anew since; choose another --config.name to start from it"
            )
        return origin

    if step == 0 or agree(not note.is_file()):
        weights = identify(reference_params())
        if jax.process_index() == 0:
            write_json(note, {"weights": weights})
        wait_for_all()
    score = make_score(work, abstract)

    def find(records: Records) -> Reference:
        identity = {
            "weights": json.loads(note.read_text())["weights"],
            "records": records.fingerprint,
            "layout": ["end to end", data.prompt_length, data.response_length],
            "share_prefix": work.config.rpo.share_prefix,
            "nll_tokens": work.config.rpo.nll_tokens,
            "compute_dtype": work.config.model.compute_dtype,
        }

        def compute(pairs: Sequence[Record]) -> Reference:
            return compute_reference(
                lambda batch: np.asarray(score(reference_params(), put_batch(batch, work.mesh))),
                heldout_batches(work, pairs, None, limit=0),
                len(pairs),
            )

        def check(path: Path, stored: Reference) -> None:
            if step == 0:  # later the digest of the weights, which is in the name, has to do
                check_reference(path, stored, records, compute, identity["compute_dtype"])

        return find_reference(
            records.directory, len(records), identity, lambda: compute(records), check
        )

    return [find(records) for records in record_sets]
