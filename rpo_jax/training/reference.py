"""Log-probabilities under the reference model: computed once, stored beside the records."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from rpo_jax.errors import UserError

Reference = Float[np.ndarray, "records M"]


def find_reference(
    records: Path,
    count: int,
    identity: dict[str, Any],
    compute: Callable[[], Reference],
) -> Reference:
    """The stored reference of a record set, or a newly computed one, stored for the next run.

    Args:
        records: folder of the record set; the reference lies in it.
        count: number of records.
        identity: all that the numbers depend on: weights, records, layout, precision. Its digest is
            part of the file's name.
        compute: makes the log-probabilities, [count, M].

    Raises:
        UserError: the stored file is damaged, or a log-probability is not finite.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = records / f"reference-{digest}.npy"
    stored = _load(path, count)
    if stored is not None:
        logging.info("reference: found %s", path)
        return stored
    result = compute()
    if jax.process_index() == 0:
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, result)
        temporary.replace(path)
    logging.info("reference: %d pairs -> %s", count, path)
    return result


def _load(path: Path, count: int) -> Reference | None:
    if not path.exists():
        return None
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete it to have it computed again"
        ) from error
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
        score: the forward pass, a batch to float32 log-probabilities [B, M].
        batches: all records once, one a row; `record_index` says which, -1 for empty rows.
        count: number of records.

    Returns:
        A float32 log-probability for each target of each record, [count, M], 0 at padding.

    Raises:
        UserError: a log-probability is not finite; names the records.
    """
    result: np.ndarray | None = None
    with tqdm(total=count, desc="reference", unit="pair", disable=None) as progress:
        for batch in batches:
            logps_BM = np.asarray(score(batch), np.float32)
            index = batch["record_index"][:, 0]
            real = index >= 0
            if not np.isfinite(logps_BM[real]).all():
                bad = index[real][~np.isfinite(logps_BM[real]).all(axis=1)]
                raise UserError(f"the reference gives no finite log-probability for records {bad}")
            if result is None:
                result = np.zeros((count, logps_BM.shape[1]), np.float32)
            result[index[real]] = logps_BM[real]
            progress.update(int(real.sum()))
    assert result is not None, "a record set is never empty"
    return result


@dataclass(frozen=True)
class Referenced(Sequence[dict[str, Any]]):
    """Records that know their `reference_logps` [M]."""

    records: Sequence[Mapping[str, Any]]
    reference: Reference

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        return {**self.records[index], "reference_logps": self.reference[index]}
