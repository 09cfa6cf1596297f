"""Ablations over a grid: `python -m rpo_jax.sweep --config configs/<name>.py`.

A sweep's config file has, beside `get_config()`, a function `sweep()` that yields a dict of dotted
overrides a point:

    def sweep():
        for alpha in (0.0, 1.0):
            for seed in range(3):
                yield {"rpo.alpha": alpha, "seed": seed}

It takes an argument as `get_config()` does: `--config configs/<name>.py:small`.

Each point is a run of its own, `runs/<name>-alpha0.0-seed0`, like any other: it can be evaluated or
exported. Finished points are kept, one that was stopped goes on; one that diverges is left behind
and named in the end. Table (CSV, JSON) and figures go to `runs/<name>/`.

Points of adapters that differ in loss weights, learning rate and seed alone can be one program:
`--together` trains all of them over one copy of the frozen base.
"""

import argparse
import contextlib
import logging
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from rpo_jax import cli
from rpo_jax.config import Config, to_dict
from rpo_jax.errors import DivergedError, UserError
from rpo_jax.exams.tables import format_table
from rpo_jax.model.qwen2 import Params
from rpo_jax.train import build, format_summary, open_inputs, summarise, train
from rpo_jax.training.audit import audit_control_tokens
from rpo_jax.training.checkpoint import (
    find_fingerprints,
    has_checkpoint,
    open_checkpoints,
    restore_state,
    save_state,
)
from rpo_jax.training.compile_once import compile_once
from rpo_jax.training.diagnostics import Watch
from rpo_jax.training.evaluation import REFERENCE_NOTE, find_references, make_evaluate
from rpo_jax.training.figures import draw_curves, draw_log_ratios, draw_maps
from rpo_jax.training.measures import explain_measure
from rpo_jax.training.metrics import MetricLog
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.origin import first_trained, load_frozen
from rpo_jax.training.results import (
    Point,
    Row,
    average,
    collect,
    group,
    list_axes,
    list_measures,
    write_results,
)
from rpo_jax.training.run import (
    check_same_run,
    describe_command,
    hold_run,
    log_to_file,
    read_fingerprints,
)
from rpo_jax.training.state import abstract_state, abstract_weights, join_params, start_from
from rpo_jax.training.together import (
    Policy,
    check_together,
    digest_shared,
    make_steps,
    make_take,
    name_settings,
    run_together,
    stack_abstract,
    stack_states,
)
from rpo_jax.training.workload import train_batches
from rpo_jax.weights.store import place_checkpoints
from rpo_jax.writing import write_json


@compile_once()
def main(argv: list[str]) -> None:
    """Trains the points of a sweep that are not finished, and shows what came of all of them."""
    args, overrides = _parse(argv)
    points = read_points(args.config, overrides)
    waiting = [point for point in points if not is_finished(point.config)]
    if args.print:
        if not waiting:
            logging.info("all %d points are finished", len(points))
        for command in list_commands(args.config, overrides, waiting):
            print(command)
        return
    logging.info("%d points, %d finished", len(points), len(points) - len(waiting))
    base, configs = cli.load_config(args.config, overrides), [point.config for point in waiting]
    # What has a checkpoint of its own goes on alone.
    shared = [own for own in configs if args.together and not has_checkpoint(own.folder)]
    diverged = train_all_together(base, shared, args.at_once)
    diverged |= train_apart([own for own in configs if own not in shared])
    if len(diverged) < len(points):
        print(report(base.folder, points))
    if diverged:
        told = "; ".join(f"{name}: {reason}" for name, reason in diverged.items())
        raise UserError(f"{len(diverged)} of {len(points)} points have no results: {told}")


def read_points(path: str, overrides: Sequence[str]) -> list[Point]:
    """The points of a config file's `sweep()`, each a run with a name of its own.

    Args:
        path: of the config file.
        overrides: of every point, as on a command line.

    Raises:
        UserError: the file has no `sweep()`, which is not a series of dicts, names a point twice,
            or overrides what cannot be; or a config is refused.
    """
    base = cli.load_config(path, overrides)
    points = []
    for changes in cli.load_sweep(path):
        name = f"{base.name}-{_name_point(changes)}"
        config = cli.load_config(path, [*overrides, *cli.as_flags({**changes, "name": name})])
        points.append(Point(changes, config))
    names = [point.config.name for point in points]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: sweep() yields {twice} more than once")
    if any(list(point.overrides) != list(points[0].overrides) for point in points):
        raise UserError(f"{path}: sweep() must override the same fields, in one order, each time")
    return points


def _name_point(changes: Mapping[str, Any]) -> str:
    """As in alpha0.5-beta0.1-seed0: the end of each field's name, and its value."""
    parts = [f"{_end(name)}{value}" for name, value in changes.items()]
    return "-".join(parts).replace("/", "_").replace(" ", "")


def _end(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def is_finished(config: Config) -> bool:
    """Whether a point's run has its summary.

    Raises:
        UserError: it has, but by another config.
    """
    if not (config.folder / "summary.json").is_file():
        return False
    check_same_run(config)
    return True


def list_commands(path: str, overrides: Sequence[str], points: Sequence[Point]) -> list[str]:
    """The command of each point, for machines that take one each."""
    return [
        shlex.join(
            [
                *("python", "-m", "rpo_jax.train", f"--config={path}", *overrides),
                *cli.as_flags({**point.overrides, "name": point.config.name}),
            ]
        )
        for point in points
    ]


def train_apart(configs: Sequence[Config]) -> dict[str, str]:
    """Trains points one after the other; returns the names of those that diverged, and why."""
    diverged = {}
    for number, config in enumerate(configs, start=1):
        logging.info("\n== point %d of %d: %s", number, len(configs), config.name)
        try:
            logging.info("\n%s", format_summary(train(build(config))))
        except DivergedError as error:
            logging.warning("warning: %s: %s", config.name, error)
            diverged[config.name] = str(error)
    return diverged


def train_all_together(
    sweep: Config, configs: Sequence[Config], at_once: int = 0
) -> dict[str, str]:
    """Trains points as one program, after those that an unfinished one holds: see below."""
    diverged: dict[str, str] = {}
    while waiting := [own for own in configs if own.name not in diverged and not is_finished(own)]:
        diverged |= train_together(sweep, waiting, at_once)
    return diverged


def train_together(sweep: Config, configs: Sequence[Config], at_once: int = 0) -> dict[str, str]:
    """Trains runs of adapters as one program; see `training.together`.

    What is unfinished lies in a folder of its own. Where some of the runs are found there, these go
    on and the others are for another call: all that are trained by one stand at the same step. In
    the end each run has its own checkpoint, logs and summary, as if it had been trained alone.

    Args:
        sweep: what the runs are points of; it names the folder.
        configs: of the runs.
        at_once: so many are computed at the same time; 0: all.

    Returns:
        Names of the runs that diverged, which have no summary, and why.

    Raises:
        UserError: the runs are not one program, or one of them cannot be trained.
    """
    check_together(configs)
    config = configs[0]
    unfinished = sweep.folder.with_name(f"{sweep.name}-together-{digest_shared(config)}")
    with (
        open_checkpoints(unfinished, config.checkpoint) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        begun = find_fingerprints(checkpoints)
        configs = _choose(configs, begun, unfinished)
        works = [build(own) for own in configs]
        inputs = [open_inputs(work) for work in works]
        for own in configs:
            stack.enter_context(hold_run(own.folder))
            stack.enter_context(log_to_file(own.folder / "log.txt"))
        work, config, records, heldout = works[0], configs[0], inputs[0].records, inputs[0].heldout
        tx = make_optimizer(config.optim)
        stack.enter_context(jax.set_mesh(work.mesh))
        single = abstract_state(work.network, tx, work.mesh)
        abstract = stack_abstract(single, len(works))
        take = make_take(single)
        frozen = load_frozen(config.folder, work.network, work.mesh)

        def first(own: Config) -> Params:
            return first_trained(own, work.network, work.mesh, frozen)

        state = restore_state(checkpoints, stack_abstract(single, len(begun)))
        if state is None:
            # Adapters begin by their seed alone, and each beginning is a program to compile.
            seeds = {own.seed: own for own in configs}
            starts = {seed: start_from(first(own), tx, single) for seed, own in seeds.items()}
            state = stack_states([starts[own.seed] for own in configs], abstract)
        elif len(configs) < len(begun):
            places = [sorted(begun).index(own.name) for own in configs]
            state = stack_states([take(state, place) for place in places], abstract)
        done = int(state.step)
        origin = join_params(first(config) if done else take(state, 0).params, frozen)
        references = find_references(
            work, config.folder, [records, heldout], done, origin, lambda: origin
        )
        # New adapters change nothing, and kept ones are the same for all: so is the reference.
        for own in configs[1:] if config.rpo.has_reference else []:
            shutil.copyfile(config.folder / REFERENCE_NOTE, own.folder / REFERENCE_NOTE)
        weights = abstract_weights(work.network, work.mesh)
        evaluate = make_evaluate(work, weights, heldout, references[1])
        # Nothing saved is nothing done: the curves then start anew, before step 0.
        step = done if done else -1
        logs = [
            stack.enter_context(MetricLog(own.folder, own.log, step, to_dict(own)))
            for own in configs
        ]
        if done == 0:
            audit_control_tokens(inputs[0].tokenizer, records, origin)
        policies = [
            Policy(own, log, Watch(own.config.name)) for own, log in zip(works, logs, strict=True)
        ]
        batches = [train_batches(own, records, references[0], done) for own in works]
        steps = make_steps(work, tx, abstract, at_once)
        state, left = run_together(
            policies, steps, state, frozen, batches, evaluate, take, checkpoints
        )
        trained = [number for number in range(len(configs)) if number not in left]
        for number in trained:
            own = configs[number]
            with open_checkpoints(own.folder, own.checkpoint) as finished:
                save_state(finished, take(state, number), read_fingerprints(own.folder))
    for number in trained:
        summarise(configs[number], inputs[number].prepared)
    # The checkpoints may lie elsewhere.
    place_checkpoints(epath.Path(unfinished), config.checkpoint.directory).rmtree(missing_ok=True)
    epath.Path(unfinished).rmtree(missing_ok=True)
    return {configs[number].name: reason for number, reason in left.items()}


def _choose(configs: Sequence[Config], begun: Mapping[str, str], unfinished: Path) -> list[Config]:
    """By name: of runs that an unfinished program holds those that are wanted, or all if none is.

    Raises:
        UserError: it holds others alone.
    """
    settings = name_settings(configs)
    going_on = [own for own in configs if begun.get(own.name) == settings[own.name]]
    if begun and not going_on:
        raise UserError(
            f"{unfinished}: holds unfinished training of {', '.join(sorted(begun))}, none of which "
            "is a point to be trained; put them back into sweep(), or delete that folder"
        )
    return sorted(going_on or configs, key=lambda own: own.name)


def report(folder: Path, points: Sequence[Point]) -> str:
    """Writes table and figures of the finished points into a folder; returns the table to show."""
    rows = collect(points)
    axes = list_axes(points)
    told = {"points": len(points), "finished": len(rows), "axes": axes}
    paths = [*write_results(folder, rows), folder / "sweep.json", *_draw(folder, rows, axes)]
    write_json(folder / "sweep.json", {"sweep": folder.name, **describe_command("sweep"), **told})
    finished = [point for point in points if is_finished(point.config)]
    if numeric := _list_numeric(rows, axes):
        drawn = draw_log_ratios(folder / "log_ratios.png", finished, numeric[0])
        paths += [drawn] if drawn else []
    shown = list_measures(rows)
    means = {name: average(rows, axes, name) for name in shown}
    table = [[*map(_end, axes), "seeds", *shown]]
    groups = group(rows, axes)
    for key, own in groups.items():
        cells = [str(means[name].get(key, "-")) for name in shown]
        table.append([*map(str, key), str(len(own)), *cells])
    head = f"{folder.name}: {len(rows)} of {len(points)} points, held out, after training; "
    several = any(len(own) > 1 for own in groups.values())
    head += "mean ± half of its 95 % interval over seeds" if several else "one seed: no intervals"
    legend = [f"{name}: {explain_measure(name)}" for name in shown]
    return "\n".join([head, "", format_table(table), "", *legend, "", *map(str, paths)])


def _draw(folder: Path, rows: Sequence[Row], axes: Sequence[str]) -> list[Path]:
    """Maps and curves over the first two axes of numbers, a file for each value of the others.

    So what they average over, and take intervals over, is seeds.
    """
    drawn = _list_numeric(rows, axes)[:2]
    varied = [axis for axis in axes if len({row[axis] for row in rows}) > 1]
    others = [axis for axis in varied if axis not in drawn]
    paths = []
    for values, own in group(rows, others).items() if drawn else ():
        mark = f"-{_name_point(dict(zip(others, values, strict=True)))}" if others else ""
        if len(drawn) == 2:
            paths.append(draw_maps(folder / f"maps{mark}.png", own, drawn))
        paths.append(draw_curves(folder / f"curves{mark}.png", own, drawn))
    return paths


def _list_numeric(rows: Sequence[Row], axes: Sequence[str]) -> list[str]:
    """The axes along which there are several numbers."""
    return [
        axis
        for axis in axes
        if all(_is_number(row[axis]) for row in rows) and len({row[axis] for row in rows}) > 1
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser(
        prog="python -m rpo_jax.sweep",
        description=__doc__,
        epilog="--config.field=value overrides a field in every point",
    )
    parser.add_argument("--config", required=True, metavar="FILE.py", help="with a sweep()")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--together", action="store_true", help="adapters: all points as one program")
    how.add_argument(
        "--print", action="store_true", help="the commands of unfinished points, for pods"
    )
    parser.add_argument(
        "--at_once",
        type=int,
        default=0,
        metavar="N",
        help="of --together: points computed at the same time (all); fewer take less memory",
    )
    args, overrides = parser.parse_overrides(argv)
    if args.at_once < 0 or (args.at_once and not args.together):
        raise UserError(f"--at_once={args.at_once}: a number of points of --together is wanted")
    return args, overrides


if __name__ == "__main__":
    with cli.exit_on_error():
        main(sys.argv[1:])
