"""Log-probabilities under the reference model: computed once, stored beside the records."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from rpo_jax.errors import UserError
from rpo_jax.training.distributed import agree
from rpo_jax.writing import write_array

Reference = Float[np.ndarray, "records M"]

_RECHECKED = 4  # pairs of a record set
_ALLOWED = 4.0  # times the measured noise


def find_reference(
    records: Path,
    count: int,
    identity: dict[str, Any],
    compute: Callable[[], Reference],
    check: Callable[[Path, Reference], None],
) -> Reference:
    """The stored reference of a record set, or a newly computed one, stored for the next run.

    Args:
        records: folder of the record set; the reference lies in it.
        count: number of records.
        identity: all that the numbers depend on: weights, records, layout, precision. Its digest is
            part of the file's name.
        compute: makes the log-probabilities, [count, M].
        check: looks at stored ones before they are used, and raises if they are wrong.

    Raises:
        UserError: the stored file is damaged, or a log-probability is not finite.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = records / f"reference-{digest}.npy"
    if agree(path.exists()):
        stored = _load(path, count)
        logging.info("reference: found %s", path)
        check(path, stored)
        return stored
    result = compute()
    if jax.process_index() == 0:
        write_array(path, result)
    logging.info("reference: %d pairs -> %s", count, path)
    return result


def _load(path: Path, count: int) -> Reference:
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged; delete it to have it computed again") from error
    if len(stored) != count or stored.dtype != np.float32:
        raise UserError(
            f"{path}: holds {len(stored)} records of {stored.dtype}, {count} of float32 are "
            "wanted; delete it to have it computed again"
        )
    return stored


def compute_reference(
    score: Callable[[dict[str, np.ndarray]], np.ndarray],
    batches: Iterable[dict[str, np.ndarray]],
    count: int,
) -> Reference:
    """Scores every record.

    Args:
        score: the forward pass, a process's rows to the log-probabilities of all rows of the global
            batch, float32 [B, M].
        batches: all records once and in order, one a row; empty rows at the end.
        count: number of records.

    Returns:
        A float32 log-probability for each target of each record, [count, M], 0 at padding.

    Raises:
        UserError: a log-probability is not finite; names the records.
    """
    result: np.ndarray | None = None
    done = 0
    with tqdm(total=count, desc="reference", unit="pair", disable=None) as progress:
        for batch in batches:
            logps_BM = np.asarray(score(batch), np.float32)
            logps_BM = logps_BM[: count - done]
            if not np.isfinite(logps_BM).all():
                bad = done + np.flatnonzero(~np.isfinite(logps_BM).all(axis=1))
                raise UserError(f"the reference gives no finite log-probability for records {bad}")
            if result is None:
                result = np.zeros((count, logps_BM.shape[1]), np.float32)
            result[done : done + len(logps_BM)] = logps_BM
            done += len(logps_BM)
            progress.update(len(logps_BM))
    assert result is not None, "a record set is never empty"
    return result


def check_reference(
    path: Path,
    stored: Reference,
    records: Sequence[Mapping[str, Any]],
    compute: Callable[[Sequence[Mapping[str, Any]]], Reference],
    compute_dtype: str,
) -> None:
    """Computes a few pairs again and compares them, a token each, with what is stored.

    How far two right answers may lie apart is measured: each pair is also computed with its
    responses in each other's place, which is the same number by another order of rounding. Four
    times the largest such difference is allowed, a rounding of the numbers themselves at least.

    Args:
        path: of the stored file.
        stored: what it holds.
        records: pairs, in its order.
        compute: makes the log-probabilities of some records.
        compute_dtype: of the program.

    Raises:
        UserError: they differ by more, with the record and both numbers.
    """
    places = np.unique(np.linspace(0, len(records) - 1, _RECHECKED).astype(int)).tolist()
    pairs = [records[place] for place in places]
    turned = [
        {**pair, "chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]}
        for pair in pairs
    ]
    live, other = np.split(compute([*pairs, *turned]), 2)
    for row, pair in zip(other, pairs, strict=True):
        chosen, rejected = len(pair["chosen_ids"]), len(pair["rejected_ids"])
        row[: chosen + rejected] = np.roll(row[: chosen + rejected], chosen)
    rounding = float(jnp.finfo(compute_dtype).eps) * float(np.abs(live).max())
    noise = max(float(np.abs(live - other).max()), rounding)
    off = np.abs(live - stored[places])
    worst = int(off.max(axis=1).argmax())
    if not off.max() <= _ALLOWED * noise:  # NaN is not
        token = int(off[worst].argmax())
        raise UserError(
            f"{path}: target {token} of record {places[worst]} is stored as "
            f"{stored[places[worst], token]:.6g} nats; the model that the run starts from gives "
            f"{live[worst, token]:.6g}, and rounding explains {_ALLOWED * noise:.2g}. Delete the "
            "file to have it computed again"
        )
    logging.info(
        "reference: %d pairs computed again, %.2g nats off at most; noise %.2g",
        len(pairs),
        off.max(),
        noise,
    )


@dataclass(frozen=True)
class Referenced(Sequence[dict[str, Any]]):
    """Records that know their `reference_logps` [M]."""

    records: Sequence[Mapping[str, Any]]
    reference: Reference

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return {**self.records[index], "reference_logps": self.reference[index]}
