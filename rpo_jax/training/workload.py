"""What a config asks for, built: network, mesh, objective, and rows for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jax.sharding import Mesh

from rpo_jax.config import Config
from rpo_jax.data.loader import MakeRow, Record, iterate_once, make_batches
from rpo_jax.data.packing import Size, deal_rows, plan_rows
from rpo_jax.data.records import Records
from rpo_jax.data.rows import PairLayout, pair_row, text_row
from rpo_jax.errors import UserError
from rpo_jax.model.qwen2 import Network
from rpo_jax.model.splash import LANES
from rpo_jax.sharding.rules import find_own_rows
from rpo_jax.training.objective import (
    Hyper,
    Objective,
    make_cpt_objective,
    make_hyper,
    make_projection,
    make_rpo_objective,
)
from rpo_jax.training.reference import Reference, Referenced

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One stage on one mesh, without data: all that shapes the program of a step."""

    config: Config
    network: Network
    mesh: Mesh
    objective: Objective
    hyper: Hyper
    make_row: MakeRow
    layout: PairLayout | None = None

    @property
    def row_network(self) -> Network:
        """The network as it reads the rows of this stage."""
        return replace(self.network, slots=self.layout.slots if self.layout else ())

    @property
    def micro_rows(self) -> int:
        """Rows of all devices that are computed at once."""
        return self.config.train.batch_rows // self.config.train.micro_batches

    @property
    def is_arranged(self) -> bool:
        """Whether the pairs of a global batch are sorted into rows and micro-batches."""
        data = self.config.data
        return self.layout is not None and (data.pairs_per_row > 1 or data.row_sizes > 1)

    @property
    def row_sizes(self) -> tuple[Size, ...]:
        """The sizes, from the least on, that a micro-batch may be cut to; empty: none is."""
        if self.layout is None or not self.is_arranged:
            return ()
        return self.layout.row_size.fractions(self.config.data.row_sizes)

    def arrange(self, records: Sequence[Record]) -> list[list[int]]:
        """The pairs of a global batch to its rows: as few as may be, like with like."""
        assert self.layout is not None
        sizes = [self.layout.pair_size(record) for record in records]
        rows = plan_rows(sizes, self.layout.row_size, self.config.data.pairs_per_row)
        return deal_rows(rows, len(records), self.config.train.micro_batches)


def make_workload(config: Config, network: Network, mesh: Mesh) -> Workload:
    """Builds the stage of a config.

    Raises:
        UserError: the rows of a micro-batch or the tokens of a row do not divide over the mesh,
            more ids are said to be used than there are, or attention is asked for that the devices
            or the rows cannot have.
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
    hyper = make_hyper(config.rpo, config.optim.learning_rate)
    how = make_projection(config)
    if config.stage == "cpt":
        objective = make_cpt_objective(network, how)
        work = Workload(config, network, mesh, objective, hyper, lambda rows: text_row(*rows))
    else:
        layout = PairLayout(
            config.data.prompt_length,
            config.data.response_length,
            share_prefix=config.rpo.share_prefix,
            prompt_targets=config.rpo.nll_tokens == "prompt+completion",
            in_slots=_has_slots(config),
        )
        reads = replace(network, slots=layout.slots)
        objective = make_rpo_objective(reads, config.rpo, how, config.data.pairs_per_row)
        make_row = partial(pair_row, layout=layout)
        work = Workload(config, network, mesh, objective, hyper, make_row, layout)
    _check_attention(work)
    return work


def _has_slots(config: Config) -> bool:
    """Whether rows are one pair in slots: for splash, where that does not make them longer."""
    alone = config.data.pairs_per_row == 1 and config.data.row_sizes == 1
    return config.model.attention.startswith("splash") and config.rpo.share_prefix and alone


def _check_attention(work: Workload) -> None:
    """Refuses rows that `seq` does not divide, and the TPU kernel where it cannot run."""
    name, mesh = work.config.model.attention, work.mesh
    is_splash = name.startswith("splash")
    platform = mesh.devices.flat[0].platform
    wanted = "tpu" if name == "splash" else "cpu"
    if is_splash and platform != wanted:
        raise UserError(
            f"model.attention={name!r} runs on {wanted} devices, these are {platform}: choose "
            "dense or blocks, or splash on TPUs"
        )
    unit = (LANES if is_splash else 1) * mesh.shape["seq"]
    lengths = "data.row_length"
    if work.layout is not None:
        lengths = "data.prompt_length, data.response_length, data.row_sizes"
    cut_to = [size.tokens for size in work.row_sizes]
    for length in cut_to or [example_batch(work)["tokens"].shape[1]]:
        if length % unit:
            raise UserError(
                f"model.attention={name!r}: rows of {length} tokens over "
                f"mesh.seq={mesh.shape['seq']}; a multiple of {unit} is wanted: change {lengths} "
                "or mesh.seq"
            )


def example_batch(work: Workload) -> Rows:
    """A global batch of the right shapes and no meaning, to lower a step without data."""
    one = np.ones(1, np.int32)
    ids = {"prompt_ids": one, "chosen_ids": one, "rejected_ids": one}
    text = np.ones(work.config.data.row_length, np.int32)
    row = work.make_row([{**ids, "tokens": text, "segment_ids": text}])
    row_records = work.config.data.pairs_per_row if work.config.stage == "rpo" else 1
    row["record_index"] = np.zeros(row_records, np.int32)
    if work.config.stage == "rpo" and work.config.rpo.stores_reference:
        row["reference_logps"] = np.zeros(row["labels"].shape, np.float32)
    count = work.config.train.batch_rows
    return {name: np.stack([value] * count) for name, value in row.items()}


def full_batch(work: Workload) -> Rows:
    """The example batch with every slot full: what a step computes at most."""
    batch = example_batch(work)
    length = batch["tokens"].shape[1]
    full = {**batch, "target_mask": np.ones_like(batch["target_mask"])}
    full["segment_ids"] = np.ones_like(full["segment_ids"])
    positions = np.arange(length)
    data, rpo = work.config.data, work.config.rpo
    if work.config.stage == "rpo":
        starts = data.prompt_length + np.arange(data.response_length)
        prompt = np.arange(data.prompt_length)
        parts = [prompt, starts, starts] if rpo.share_prefix else [prompt, starts] * 2
        positions = np.concatenate(parts)
    full["positions"] = np.broadcast_to(positions, full["positions"].shape)
    return full


def train_batches(
    work: Workload, records: Records, reference: Reference | None, start_step: int
) -> Iterator[Rows]:
    """This process's rows of each global batch from `start_step` on, without end."""
    return make_batches(
        records if reference is None else Referenced(records, reference),
        work.make_row,
        batch_rows=work.config.train.batch_rows,
        seed=work.config.seed,
        start_step=start_step,
        own_rows=find_own_rows(work.mesh, work.config.train.batch_rows),
        arrange=work.arrange if work.is_arranged else None,
        row_records=work.config.data.pairs_per_row if work.is_arranged else 1,
    )


def heldout_batches(
    work: Workload, records: Sequence[Record], reference: Reference | None, limit: int
) -> Iterator[Rows]:
    """Each of the first `limit` records (0: of all) once, in batches of a micro-batch's rows."""
    return iterate_once(
        records if reference is None else Referenced(records, reference),
        work.make_row,
        batch_rows=work.micro_rows,
        limit=limit,
        own_rows=find_own_rows(work.mesh, work.micro_rows),
    )
