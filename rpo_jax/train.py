"""Trains one run: `python -m rpo_jax.train --config configs/<name>.py`."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from rpo_jax import cli
from rpo_jax.config import Config, to_dict
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.records import Records, open_records
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError
from rpo_jax.examine import make_dev_looks
from rpo_jax.inputs import format_inputs, list_inputs
from rpo_jax.model.qwen2 import Params, make_network
from rpo_jax.prepare import Prepared, load_tokenizer, prepare
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.audit import audit_control_tokens
from rpo_jax.training.checkpoint import find_best, open_checkpoints, restore_state
from rpo_jax.training.distributed import OPTIONS, in_turn, joined, read_cluster
from rpo_jax.training.dry_run import describe_elsewhere, describe_run
from rpo_jax.training.evaluation import find_references, make_evaluate
from rpo_jax.training.loop import Look, heldout_names, run_steps
from rpo_jax.training.measures import format_measures
from rpo_jax.training.metrics import MetricLog
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.origin import first_trained, load_frozen
from rpo_jax.training.run import (
    check_folder,
    check_vocabulary,
    find_shape,
    hold_run,
    log_to_file,
    open_run,
    read_fingerprints,
    read_metrics,
)
from rpo_jax.training.state import (
    abstract_state,
    abstract_weights,
    join_params,
    start_from,
)
from rpo_jax.training.step import make_step
from rpo_jax.training.workload import Workload, make_workload, train_batches
from rpo_jax.weights.store import find_checkpoints
from rpo_jax.writing import write_json


def main(
    config: Config,
    dry_run: bool = False,
    processes: str = "",
    coordinator: str = "",
    process: str = "",
    timeout_s: str = "",
) -> None:
    """Trains one run, CPT or RPO as the config says; run again, it goes on where it stopped."""
    with joined(config, read_cluster(processes, coordinator, process, timeout_s)):
        for part in tell_plan(config) if dry_run else _tell_run(config):
            if jax.process_index() == 0:
                print(part)


def tell_plan(config: Config) -> Iterator[str]:
    """What a run reads, and what it would do; nothing is made.

    Raises:
        UserError: after that, if something that it reads is missing.
    """
    check_folder(config)
    inputs = list_inputs(config)
    missing = [name for name, found in inputs.items() if isinstance(found, UserError)]
    yield f"{format_inputs(inputs)}\n"
    if elsewhere := describe_elsewhere(config):
        yield elsewhere
    elif "init_from" not in missing:  # the shape comes from there
        yield describe_run(build(config))
    if missing:
        raise UserError(f"the run cannot start yet, see MISSING above: {', '.join(missing)}")


def _tell_run(config: Config) -> Iterator[str]:
    started = time.perf_counter()
    summary = format_summary(train(build(config)))
    yield f"{summary}\n\nthis command took {time.perf_counter() - started:,.0f} s"


def build(config: Config) -> Workload:
    """The workload of a config, on all devices of all processes."""
    network = make_network(find_shape(config), config.model, config.lora)
    return make_workload(config, network, make_mesh(config.mesh))


@dataclass(frozen=True)
class Inputs:
    """What a run reads, and the dev exam that it takes."""

    tokenizer: Tokenizer
    prepared: Prepared
    records: Records
    heldout: Records
    general: Records | None
    exams: tuple[Look, ...]


def open_inputs(work: Workload) -> Inputs:
    """Tokenizer and records of a run, prepared where they are missing; makes its folder.

    Raises:
        UserError: they do not fit the network, or the run that is there is another one.
    """
    check_folder(work.config)  # before anything is made
    tokenizer = in_turn(lambda: load_tokenizer(work.config))
    check_vocabulary(work.config, tokenizer, work.network.shape)
    exams = make_dev_looks(work.config, work.network, work.mesh, tokenizer)
    prepared = in_turn(lambda: prepare(work.config, tokenizer))
    records, heldout = open_records(prepared.train), open_records(prepared.heldout)
    fingerprints = {
        "the tokenizer": tokenizer.fingerprint,
        "the training data": records.fingerprint,
        "the held-out data": heldout.fingerprint,
    }
    general = open_records(prepared.general) if prepared.general else None
    if general is not None:
        fingerprints["the general text"] = general.fingerprint
    in_turn(lambda: open_run(work.config, work.network.shape, tokenizer, fingerprints))
    return Inputs(tokenizer, prepared, records, heldout, general, tuple(exams))


def train(work: Workload) -> dict[str, Any]:
    """Prepares, trains, evaluates and writes a run; returns its summary.

    Whatever is there already is used: records, reference, the newest checkpoint.
    """
    config, network, mesh = work.config, work.network, work.mesh
    folder, inputs = config.folder, open_inputs(work)
    records, heldout = inputs.records, inputs.heldout
    tx = make_optimizer(config.optim)
    with (
        jax.set_mesh(mesh),
        hold_run(folder),
        log_to_file(folder / "log.txt"),
        open_checkpoints(folder, config.checkpoint) as checkpoints,
    ):
        abstract = abstract_state(network, tx, mesh)
        frozen = load_frozen(folder, network, mesh)

        def first() -> Params:
            return first_trained(config, network, mesh, frozen)

        state = restore_state(checkpoints, abstract)
        if state is None:
            state = start_from(first(), tx, abstract)
            logging.info("starting from %s", config.init_from or "random weights")
        else:
            word = "finished" if int(state.step) == config.train.steps else "going on"
            logging.info("%s: %s, at step %d", folder, word, state.step)
        done = int(state.step)
        params = join_params(state.params, frozen)
        references = find_references(
            work, folder, [records, heldout], done, params, lambda: join_params(first(), frozen)
        )
        evaluate = make_evaluate(
            work, abstract_weights(network, mesh), heldout, references[1], inputs.general
        )
        looks = [
            Look(
                config.train.eval_every_steps,
                lambda params, step: heldout_names(evaluate(params)),
                logged="heldout/loss",
            ),
            *inputs.exams,
        ]
        # Nothing saved is nothing done: the curves then start anew, before step 0.
        with MetricLog(folder, config.log, done if done else -1, to_dict(config)) as log:
            if done == 0:
                audit_control_tokens(inputs.tokenizer, records, params)
            step = make_step(work, tx, abstract)
            batches = train_batches(work, records, references[0], done)
            state = run_steps(work, step, state, frozen, batches, looks, checkpoints, log)
        best = find_best(checkpoints, config.checkpoint)
    return in_turn(lambda: summarise(config, inputs.prepared, best))


def summarise(
    config: Config, prepared: Prepared, best: tuple[int, float] | None = None
) -> dict[str, Any]:
    """Writes and returns what came of a run: measures before and after, and the paths.

    Args:
        config: of the run.
        prepared: its records.
        best: step and score of the checkpoint that the dev exam selects.
    """
    folder = config.folder
    lines = read_metrics(folder)
    heldout = _before_and_after(config, lines, "heldout/")
    if len(heldout) < 2:
        raise UserError(
            f"{folder}/metrics.jsonl: the held-out measures of step 0 or {config.train.steps} are "
            "lost; `rpo_jax.evaluate` measures the checkpoint again"
        )
    checkpoints = find_checkpoints(epath.Path(folder))
    summary: dict[str, Any] = {
        "name": config.name,
        "stage": config.stage,
        "steps": config.train.steps,
        "trained_on": _count_records(config, open_records(prepared.train)),
        "heldout": heldout,
        "exam": _before_and_after(config, lines, "exam/"),
        "best": None,
        "data": read_fingerprints(folder),
        "paths": {
            "run": str(folder),
            "checkpoint": str(checkpoints / str(config.train.steps)),
            "metrics": str(folder / "metrics.jsonl"),
            "log": str(folder / "log.txt"),
            "records": str(prepared.train),
            "heldout_records": str(prepared.heldout),
        },
    }
    if best:
        step, score = best
        summary["best"] = {"step": step, "mode": config.checkpoint.best, "share": score}
        summary["paths"]["best_checkpoint"] = str(checkpoints / str(step))
    if jax.process_index() == 0:
        write_json(folder / "summary.json", summary)
    return summary


def _count_records(config: Config, records: Records) -> dict[str, Any]:
    """How much a run reads: records, passes over those there are, tokens without padding."""
    read = config.train.steps * config.train.batch_rows
    passes = read / len(records)
    tokens = Ledger.from_dict(records.info["ledger"]).tokens
    kind = "rows" if config.stage == "cpt" else "pairs"
    return {"kind": kind, "read": read, "passes": passes, "tokens": round(passes * tokens)}


def _before_and_after(
    config: Config, lines: list[dict[str, float]], prefix: str
) -> dict[str, dict[str, float]]:
    """The scalars of a prefix that were logged at the first and the last step."""
    found: dict[str, dict[str, float]] = {}
    for when, step in (("before", 0), ("after", config.train.steps)):
        for line in lines:
            here = {n.removeprefix(prefix): line[n] for n in line if n.startswith(prefix)}
            if line["step"] == step and here:
                found[when] = here
    return found


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    data = summary["trained_on"]
    lines = [
        f"{summary['name']}: {summary['stage']}, {summary['steps']:,} steps, {data['read']:,} "
        f"{data['kind']} ({data['passes']:.2f} passes), about {data['tokens']:,} tokens"
    ]
    for title, part in (("held out", "heldout"), ("dev exam", "exam")):
        if found := summary[part]:
            columns = {when: found.get(when, {}) for when in ("before", "after")}
            lines += ["", *format_measures(title, columns)]
    if best := summary["best"]:
        lines += ["", f"best by the dev exam, {best['mode']}: step {best['step']}, "]
        lines[-1] += f"{best['share']:.1%} of the points"
    lines += ["", *(f"{name:<22}{path}" for name, path in summary["paths"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(
        main,
        options=OPTIONS,
        examples=(
            "--config configs/fictional_base.py",
            "--config configs/fictional_base.py --config.name=longer --config.train.steps=1000",
            "--config configs/igakuqa_cpt.py --dry_run",
        ),
        dry_run="tell what the run would read, take and make, and stop",
    )
