"""Ablations over a grid: `python -m rpo_jax.sweep --config configs/<name>.py`.

A sweep's config file has, beside `get_config()`, a function `sweep()` that yields a dict of dotted
overrides a point:

    def sweep():
        for alpha in (0.0, 1.0):
            for seed in range(3):
                yield {"rpo.alpha": alpha, "seed": seed}

It takes an argument as `get_config()` does: `--config configs/<name>.py:small`.

Each point is a run of its own, `runs/<name>-alpha0.0-seed0`, like any other: it can be evaluated or
exported. Finished points are kept, one that was stopped goes on. Table (CSV, JSON) and figures go
to `runs/<name>/`.

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

from rpo_jax import cli
from rpo_jax.config import Config, to_dict
from rpo_jax.errors import UserError
from rpo_jax.exams.tables import format_table
from rpo_jax.model.qwen2 import Params
from rpo_jax.train import build, format_summary, open_inputs, summarise, train
from rpo_jax.training.audit import audit_control_tokens
from rpo_jax.training.checkpoint import open_checkpoints, restore_state, save_state
from rpo_jax.training.compile_once import compile_once
from rpo_jax.training.evaluation import REFERENCE_NOTE, find_references, make_evaluate
from rpo_jax.training.figures import draw_curves, draw_log_ratios, draw_maps
from rpo_jax.training.measures import explain_measure
from rpo_jax.training.metrics import MetricLog
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.origin import first_trained, load_frozen
from rpo_jax.training.results import (
    MEASURES,
    Point,
    average,
    collect,
    list_axes,
    write_results,
)
from rpo_jax.training.run import check_same_run
from rpo_jax.training.state import abstract_state, abstract_weights, join_params, start_from
from rpo_jax.training.together import (
    check_together,
    digest_together,
    log_heldout,
    make_steps,
    make_take,
    run_together,
    stack_abstract,
    stack_states,
)
from rpo_jax.training.workload import train_batches


@compile_once()
def main(argv: list[str]) -> None:
    """Trains the points of a sweep that are not finished, and shows what came of all of them."""
    args, overrides = _parse(argv)
    points = read_points(args.config, overrides)
    waiting = [point for point in points if not is_finished(point.config)]
    if args.print:
        print("\n".join(list_commands(args.config, overrides, waiting)))
        return
    logging.info("%d points, %d finished", len(points), len(points) - len(waiting))
    if waiting and args.together:
        train_together([point.config for point in waiting], args.at_once)
    for number, point in enumerate([] if args.together else waiting, start=1):
        logging.info("\n== point %d of %d: %s", number, len(waiting), point.config.name)
        logging.info("\n%s", format_summary(train(build(point.config))))
    print(report(cli.load_config(args.config, overrides).folder, points))


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
        config = cli.load_config(path, [*overrides, *_as_flags({**changes, "name": name})])
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
    parts = [f"{name.rsplit('.', 1)[-1]}{value}" for name, value in changes.items()]
    return "-".join(parts).replace("/", "_").replace(" ", "")


def _as_flags(changes: Mapping[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in changes.items()]


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
                *_as_flags({**point.overrides, "name": point.config.name}),
            ]
        )
        for point in points
    ]


def train_together(configs: Sequence[Config], at_once: int = 0) -> None:
    """Trains several runs of adapters as one program; see `training.together`.

    So many are computed `at_once`, all if it is 0.

    What is unfinished lies in a folder of its own and goes on from there. In the end each run has
    its own checkpoint, logs and summary, as if it had been trained alone.

    Raises:
        UserError: the runs are not one program, or one of them cannot be trained.
    """
    check_together(configs)
    works = [build(config) for config in configs]
    inputs = [open_inputs(work) for work in works]
    work, config, records, heldout = works[0], configs[0], inputs[0].records, inputs[0].heldout
    unfinished = Path(config.workdir) / f"together-{digest_together(configs)}"
    tx = make_optimizer(config.optim)
    with (
        jax.set_mesh(work.mesh),
        open_checkpoints(unfinished, config.checkpoint) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        single = abstract_state(work.network, tx, work.mesh)
        abstract = stack_abstract(single, len(works))
        frozen = load_frozen(config.folder, work.network, work.mesh)

        def first(own: Config) -> Params:
            return first_trained(own, work.network, work.mesh, frozen)

        state = restore_state(checkpoints, abstract)
        if state is None:
            # Adapters begin by their seed alone, and each beginning is a program to compile.
            seeds = {own.seed: own for own in configs}
            starts = {seed: start_from(first(own), tx, single) for seed, own in seeds.items()}
            state = stack_states([starts[own.seed] for own in configs], abstract)
        done, take = int(state.step), make_take(single)
        origin = join_params(first(config) if done else take(state, 0).params, frozen)
        references = find_references(
            work, config.folder, [records, heldout], done, origin, lambda: origin
        )
        # New adapters change nothing, and kept ones are the same for all: so is the reference.
        for own in configs[1:] if config.rpo.has_reference else []:
            shutil.copyfile(config.folder / REFERENCE_NOTE, own.folder / REFERENCE_NOTE)
        weights = abstract_weights(work.network, work.mesh)
        evaluate = make_evaluate(work, weights, heldout, references[1])
        logs = [
            stack.enter_context(MetricLog(own.folder, own.log, done if done else -1, to_dict(own)))
            for own in configs
        ]
        if done == 0:
            audit_control_tokens(inputs[0].tokenizer, records, origin)
            log_heldout(works, take, state, frozen, evaluate, logs)
        batches = [train_batches(own, records, references[0], done) for own in works]
        steps = make_steps(work, tx, abstract, at_once)
        state = run_together(
            works, steps, state, frozen, batches, evaluate, take, checkpoints, logs
        )
        log_heldout(works, take, state, frozen, evaluate, logs)
        for number, own in enumerate(configs):
            with open_checkpoints(own.folder, own.checkpoint) as finished:
                save_state(finished, take(state, number))
    for own, read in zip(configs, inputs, strict=True):
        summarise(own, read.prepared)
    shutil.rmtree(unfinished)


def report(folder: Path, points: Sequence[Point]) -> str:
    """Writes table and figures of the finished points into a folder; returns the table to show."""
    rows = collect(points)
    if not rows:
        raise UserError(f"{folder}: no point is finished")
    axes = list_axes(points)
    paths = write_results(folder, rows)
    numeric = [
        axis
        for axis in axes
        if all(_is_number(row[axis]) for row in rows) and len({row[axis] for row in rows}) > 1
    ]
    if len(numeric) > 1:
        paths.append(draw_maps(folder / "maps.png", rows, numeric))
    if numeric:
        paths.append(draw_curves(folder / "curves.png", rows, numeric))
        finished = [point for point in points if is_finished(point.config)]
        drawn = draw_log_ratios(folder / "log_ratios.png", finished, numeric[0])
        paths += [drawn] if drawn else []
    shown = [name for name in MEASURES if name in rows[0]]
    means = {name: average(rows, axes, name) for name in shown}
    table = [[*(axis.rsplit(".", 1)[-1] for axis in axes), "seeds", *shown]]
    for key, mean in means[shown[0]].items():
        cells = [str(means[name][key]) for name in shown]
        table.append([*map(str, key), str(mean.count), *cells])
    head = f"{folder.name}: {len(rows)} of {len(points)} points, held out, after training; "
    several = any(mean.count > 1 for mean in means[shown[0]].values())
    head += "mean ± half of its 95 % interval over seeds" if several else "one seed: no intervals"
    legend = [f"{name}: {explain_measure(name)}" for name in shown]
    return "\n".join([head, "", format_table(table), "", *legend, "", *map(str, paths)])


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
