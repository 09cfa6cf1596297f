"""What a config asks for, built: network, mesh, objective, and rows for it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rpo_jax.config import Config
from rpo_jax.data.loader import iterate_once, make_batches
from rpo_jax.data.records import Records
from rpo_jax.data.rows import pair_row, text_row
from rpo_jax.errors import UserError
from rpo_jax.model.qwen2 import Network
from rpo_jax.model.splash import LANES
from rpo_jax.training.objective import (
    Hyper,
    Objective,
    make_cpt_objective,
    make_hyper,
    make_projection,
    make_rpo_objective,
)
from rpo_jax.training.reference import Reference, join_reference

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One stage on one mesh, without data: all that shapes the program of a step."""

    config: Config
    network: Network
    mesh: Mesh
    objective: Objective
    hyper: Hyper
    make_row: Callable[[Mapping[str, Any]], Rows]

    @property
    def micro_rows(self) -> int:
        """Rows of all devices that are computed at once."""
        return self.config.train.batch_rows // self.config.train.micro_batches


def make_workload(config: Config, network: Network, mesh: Mesh) -> Workload:
    """Builds the stage of a config.

    Raises:
        UserError: the rows of a micro-batch do not divide over the mesh, more ids are said to be
            used than there are, or attention is asked for that the devices or the rows cannot have.
    """
    used, rows = config.model.used_vocab_size, network.shape.vocab_size
    if used > rows:
        raise UserError(f"model.used_vocab_size={used}: the model has only {rows} rows")
    train = config.train
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if (train.batch_rows // train.micro_batches) % shards:
        raise UserError(
            f"train.batch_rows={train.batch_rows} in train.micro_batches={train.micro_batches} "
            f"parts is {train.batch_rows // train.micro_batches} rows, which the mesh's "
            f"data*fsdp={shards} does not divide"
        )
    if config.stage == "cpt":
        objective = make_cpt_objective(network, make_projection(config))
        make_row: Callable[[Mapping[str, Any]], Rows] = text_row
    else:
        objective = make_rpo_objective(network, config.rpo, make_projection(config))
        make_row = partial(_make_pair_row, config)
    hyper = make_hyper(config.rpo, config.optim.learning_rate)
    work = Workload(config, network, mesh, objective, hyper, make_row)
    if config.model.attention != "dense":
        _check_splash(work)
    return work


def _check_splash(work: Workload) -> None:
    """Refuses the TPU kernel where it cannot run."""
    name, mesh = work.config.model.attention, work.mesh
    platform = mesh.devices.flat[0].platform
    wanted = "tpu" if name == "splash" else "cpu"
    if platform != wanted:
        raise UserError(
            f"model.attention={name!r} runs on {wanted} devices, these are {platform}: choose "
            "dense, or splash on TPUs"
        )
    length = example_batch(work)["tokens"].shape[1]
    if length % (LANES * mesh.shape["seq"]):
        raise UserError(
            f"model.attention={name!r}: rows of {length} tokens over mesh.seq={mesh.shape['seq']}; "
            f"a multiple of {LANES} on each device is wanted: change data.row_length (cpt), or "
            "data.prompt_length and data.response_length (rpo)"
        )


def _make_pair_row(config: Config, record: Mapping[str, Any]) -> Rows:
    return pair_row(
        record["prompt_ids"],
        record["chosen_ids"],
        record["rejected_ids"],
        prompt_length=config.data.prompt_length,
        response_length=config.data.response_length,
        share_prefix=config.rpo.share_prefix,
        prompt_targets=config.rpo.nll_tokens == "prompt+completion",
    )


def example_batch(work: Workload) -> Rows:
    """A global batch of the right shapes and no meaning, to lower a step without data."""
    one = np.ones(1, np.int32)
    ids = {"prompt_ids": one, "chosen_ids": one, "rejected_ids": one}
    text = np.ones(work.config.data.row_length, np.int32)
    row = work.make_row({**ids, "tokens": text, "segment_ids": text})
    row["record_index"] = np.int32(0)  # type: ignore[assignment]
    if work.config.stage == "rpo" and work.config.rpo.has_reference:
        row["reference_logps"] = np.zeros(row["labels"].shape, np.float32)
    count = work.config.train.batch_rows
    return {name: np.stack([value] * count) for name, value in row.items()}


def train_batches(
    work: Workload, records: Records, reference: Reference | None, start_step: int
) -> Iterator[Rows]:
    """This process's rows of each global batch from `start_step` on, without end."""
    batches = make_batches(
        records,
        work.make_row,
        batch_rows=work.config.train.batch_rows,
        seed=work.config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (_join(batch, reference) for batch in batches)


def heldout_batches(
    work: Workload, records: Records, reference: Reference | None, limit: int
) -> Iterator[Rows]:
    """Each of the first `limit` records (0: of all) once, in batches of a micro-batch's rows."""
    batches = iterate_once(
        records,
        work.make_row,
        batch_rows=work.micro_rows,
        limit=limit,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (_join(batch, reference) for batch in batches)


def _join(batch: Rows, reference: Reference | None) -> Rows:
    return batch if reference is None else join_reference(batch, reference)
