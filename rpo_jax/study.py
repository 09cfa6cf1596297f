"""The paper's comparison in the embedded world: `python -m rpo_jax.study`.

A study's config file has, beside `get_config()` for what its runs share, a function `arms()` that
yields a name and dotted overrides an arm. `init_from` names the arm that another one starts from:

    def arms():
        yield "base", {"stage": "cpt", "init_from": "", ...}
        yield "cpt", {"stage": "cpt", "init_from": "base", ...}
        yield "dpo", {"init_from": "cpt", "rpo.alpha": 0.0}

In each world of `study.worlds` and with each seed of `study.seeds` every arm is a run of its own,
`runs/<name>-world0-dpo-seed0`; what `study.start` comes from is trained once a world. Pairs are
made of answers that the arm's start gives, so arms with one start train on the same. Then every
run, but those of `study.unexamined`, answers the test questions of its world, at once and after
explaining, as `exam` says. Finished runs and answers are kept, whatever was stopped goes on. Tables
(JSON, CSV) and figures go to `runs/<name>/`.
"""

import logging
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rpo_jax import cli
from rpo_jax.config import MODES, Config, Exam
from rpo_jax.data.records import digest
from rpo_jax.errors import UserError
from rpo_jax.examine import Plan, lay_out, take_exam
from rpo_jax.exams.arms import GAINS, Sat, compare_arms, contrast_arms, list_marks
from rpo_jax.exams.asking import ANSWER_ONLY, EXPLAIN_FIRST, Drawing
from rpo_jax.exams.exam import find_exam
from rpo_jax.exams.fictional import is_test_world
from rpo_jax.exams.fictional.kinds import KINDS
from rpo_jax.exams.report import mark_sitting
from rpo_jax.exams.tables import format_table
from rpo_jax.iterate import run_round
from rpo_jax.sweep import is_finished
from rpo_jax.train import build, format_summary, train
from rpo_jax.training.compile_once import compile_once
from rpo_jax.training.figures import draw_arms, draw_log_ratios
from rpo_jax.training.results import (
    Mean,
    Point,
    Row,
    average,
    collect,
    estimate_mean,
    warn_of_guessing,
    write_results,
    write_table,
)
from rpo_jax.training.run import describe_command
from rpo_jax.writing import write_json

DEFAULT = "configs/study.py"
_SHOWN = {  # held-out measures, where a stage has them
    "nll": "nats/token",
    "preference_accuracy": "preference accuracy",
    "reward_accuracy": "reward accuracy",
    "margin": "margin, nats",
}


_OVER_RUNS = (*MODES, "difference", *GAINS)


@dataclass(frozen=True)
class Run:
    """One arm in one world with one seed."""

    arm: str
    config: Config


@compile_once()
def main(argv: list[str]) -> None:
    """Trains and examines every arm of a study, and shows all of them side by side."""
    path, overrides = _parse(argv)
    shared, runs = read_study(path, overrides)
    logging.info("%s", describe(shared, runs))
    began, sats = time.perf_counter(), []
    for number, run in enumerate(runs, start=1):
        told = f"run {number} of {len(runs)}, {run.config.name}"
        logging.info("\n== %s (%.0f s so far)", told, time.perf_counter() - began)
        train_run(run.config)
        if run.arm not in shared.study.unexamined:
            sats.append(examine(shared, run))
    examined = [run for run in runs if run.arm not in shared.study.unexamined]
    print(report(shared, examined, sats))


def read_study(path: str, overrides: Sequence[str]) -> tuple[Config, list[Run]]:
    """What the runs of a study share, and its runs, each after the one that it starts from.

    Args:
        path: of the config file; an argument of its functions may follow after a colon.
        overrides: of every run, as on a command line.

    Raises:
        UserError: the file has no `arms()`, an arm starts from one that does not come before it, or
            a config is refused.
    """
    shared = _load(f"{path}: get_config(), before any arm", path, overrides)
    arms = {}
    for name, changes in cli.load_arms(path).items():
        arms[name] = _load(f"{path}: arm {name}", path, [*cli.as_flags(changes), *overrides])
        for word in overrides:
            field, _, value = word.removeprefix("--config.").partition("=")
            if field in changes and value != str(changes[field]):
                logging.warning(
                    "warning: %s holds for %s too, which sets %s: is it still that arm? What only "
                    "some arms are to have goes into arms()",
                    word,
                    name,
                    changes[field],
                )
    for field in ("worlds", "seeds"):
        if not getattr(shared.study, field):
            raise UserError(f"study.{field}=(): one at least is wanted")
    if shared.study.start not in arms:
        raise UserError(f"study.start={shared.study.start!r} is none of {', '.join(arms)}")
    before: list[str] = []
    for name, config in arms.items():
        if config.init_from and config.init_from not in before:
            raise UserError(
                f"{path}: {name} starts from {config.init_from!r}, which is no arm before it "
                f"({', '.join(before) or 'there is none'})"
            )
        if config.data.fictional.size != shared.data.fictional.size:
            raise UserError(
                f"{path}: {name} sets data.fictional.size: all arms take one exam; set it in "
                "get_config()"
            )
        before.append(name)
    if shared.study.start in shared.study.unexamined:
        raise UserError(f"study.unexamined: {shared.study.start} is the arm compared with")
    once = _list_origins(arms, shared.study.start)
    runs = [
        _place(shared, name, arms, once, world, seed)
        for world in shared.study.worlds
        for place, seed in enumerate(shared.study.seeds)
        for name in arms
        if name not in once or place == 0
    ]
    return shared, runs


def _load(what: str, path: str, overrides: Sequence[str]) -> Config:
    try:
        return cli.load_config(path, overrides)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _list_origins(arms: Mapping[str, Config], start: str) -> list[str]:
    """The arms that `start` comes from, and all that begin at random."""
    found = [name for name, config in arms.items() if not config.init_from]
    while (start := arms[start].init_from) and start not in found:
        found.append(start)
    return found


def _place(
    shared: Config,
    arm: str,
    arms: Mapping[str, Config],
    once: Collection[str],
    world: int,
    seed: int,
) -> Run:
    """An arm in a world, with a seed."""

    def name_run(name: str) -> str:
        own = "" if name in once else f"-seed{seed}"
        return f"{shared.name}-world{world}-{name}{own}"

    config = arms[arm]
    fictional = replace(config.data.fictional, seed=world)
    return Run(
        arm,
        replace(
            config,
            name=name_run(arm),
            seed=seed,
            init_from=name_run(config.init_from) if config.init_from else "",
            data=replace(config.data, fictional=fictional),
            exam=config.exam if config.exam.name else Exam(),
        ),
    )


def describe(shared: Config, runs: Sequence[Run]) -> str:
    """What a study is about to do, in words."""
    kinds = {
        "test worlds, kept for what is reported": [
            w for w in shared.study.worlds if is_test_world(w)
        ],
        "dev worlds, to be tuned on": [w for w in shared.study.worlds if not is_test_world(w)],
    }
    worlds = "; ".join(
        f"{what}: {', '.join(map(str, found))}" for what, found in kinds.items() if found
    )
    arms = ", ".join(dict.fromkeys(run.arm for run in runs))
    return f"{shared.name}: {len(runs)} runs\n{worlds}\narms: {arms}"


def train_run(config: Config) -> None:
    """Trains a run that is not finished, on pairs of sampled answers if it says so."""
    if is_finished(config):
        logging.info("%s: finished", config.folder)
    elif config.data.source == "candidates":
        run_round(config)
    else:
        logging.info("\n%s", format_summary(train(build(config))))


def examine(shared: Config, run: Run) -> Sat:
    """Has a run answer the test questions of its world, in both ways; what is there is kept."""
    asked = shared.exam
    drawing = Drawing({ANSWER_ONLY: asked.answer_tokens, EXPLAIN_FIRST: asked.explain_tokens})
    exam = find_exam("fictional")
    plan = Plan(
        exam,
        limit=asked.questions,
        shots=exam.shots,
        drawing=drawing,
        weigh=False,
        slots=asked.slots,
        mesh=run.config.mesh,
    )
    setting = digest([plan.limit, *drawing.max_tokens.values()])[:8]
    out = run.config.folder / "exams" / f"study-{run.config.train.steps}-{setting}"
    take_exam(run.config.folder, replace(plan, out=str(out)))
    marks = mark_sitting(exam, out, lay_out(plan, run.config).questions)
    return Sat(
        run.arm,
        run.config.data.fictional.seed,
        run.config.seed,
        {mode: marks[mode][0] for mode in MODES},
    )


def report(shared: Config, runs: Sequence[Run], sats: Sequence[Sat]) -> str:
    """Writes tables and figures of a study into its folder; returns the tables to show."""
    folder, start = shared.folder, shared.study.start
    points = [Point({"arm": run.arm}, run.config) for run in runs]
    rows: list[Row] = [
        {"world": sat.world, "seed": sat.seed, **row, **sat.scores(), **sat.gains(sats, start)}
        for row, sat in zip(collect(points), sats, strict=True)
    ]
    compared, over_runs = compare_arms(sats, start), average_runs(rows)
    after = list(dict.fromkeys(run.arm for run in runs if _find_start(run, runs) == start))
    contrasts = contrast_arms(sats, after)
    paths = [*write_results(folder, rows), write_table(folder / "marks.csv", list_marks(sats))]
    measured = {
        "study": shared.name,
        **describe_command("study"),
        "worlds": shared.study.worlds,
        "seeds": shared.study.seeds,
        "start": start,
        "arms": compared,
        "over_runs": {
            arm: {name: mean.to_dict() for name, mean in means.items()}
            for arm, means in over_runs.items()
        },
        "contrasts": contrasts,
    }
    write_json(folder / "study.json", measured)
    paths += [folder / "study.json", draw_arms(folder / "arms.png", compared, rows)]
    from_start = [
        Point({"arm": run.arm}, run.config)
        for run in runs
        if run.arm in after and run.config.stage == "rpo" and run.config.rpo.has_reference
    ]
    if from_start:
        drawn = draw_log_ratios(folder / "log_ratios.png", from_start, "arm")
        paths += [drawn] if drawn else []
    tables = [format_heldout(rows), format_arms(compared, rows)]
    tables += [format_sections(compared), format_kinds(compared), format_explanations(compared)]
    if any(means["difference"].count > 1 for means in over_runs.values()):
        tables.append(format_runs(over_runs))
    if contrasts:
        tables.append(format_contrasts(contrasts))
    return "\n\n".join(["", *tables, "\n".join(map(str, paths))])


def _find_start(run: Run, runs: Sequence[Run]) -> str:
    """The arm that a run starts from; "" if from none."""
    return next((one.arm for one in runs if one.config.name == run.config.init_from), "")


def format_heldout(rows: Sequence[Row]) -> str:
    """What each arm's training changed on held-out data; the mean over its runs."""
    table = [["trained", "tokens", "held out", "before", "after"]]
    for arm, own in _by_arm(rows).items():
        for name, text in _SHOWN.items():
            if name in own[0]:
                of_pairs = "preference_accuracy" in own[0]
                what = "chosen nats/token" if of_pairs and name == "nll" else text
                before, after, tokens = (
                    average(own, ["arm"], measure)[arm,]
                    for measure in (f"{name}_before", name, "tokens")
                )
                table.append([arm, f"{tokens.value:,.0f}", what, str(before), str(after)])
    return format_table(table)


def format_arms(compared: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """The arms side by side, with 95 % intervals over questions."""
    head = ["arm", "runs", "answer only", "explain first", "difference"]
    table = [[*head, "explaining gains", "difference gains", "parse", "stop"]]
    for arm, own in _by_arm(rows).items():
        found = compared[arm]
        cells = [f"{found[mode]['value']:.1%}" for mode in MODES]
        gains = [found.get(f"{measure}_gain") for measure in (EXPLAIN_FIRST, "difference")]
        cells += [_say(found["difference"]), *(_say(gain) if gain else "-" for gain in gains)]
        for rate in ("parse", "stop"):
            means = [average(own, ["arm"], f"{mode}_{rate}")[arm,].value for mode in MODES]
            cells.append(" / ".join(f"{mean:.0%}" for mean in means))
        table.append([arm, str(found["runs"]), *cells])
    first, warning = next(iter(compared.values())), warn_of_guessing(compared)
    return (
        f"{first['questions']:,} test questions, of which guessing gets {first['guessing']:.0%} "
        "right; points of 100, 95 % intervals over questions; difference: explaining first less "
        f"answering only; gains: less the same of study.start\n\n{format_table(table)}"
    ) + (f"\n\n{warning}" if warning else "")


def format_sections(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy by whether training questions gave facts about the same diseases away."""
    parts = list(next(iter(compared.values()))["sections"])
    table = [["right in sections", *(f"{part} {mode}" for part in parts for mode in MODES)]]
    for arm, found in compared.items():
        shares = [found["sections"][part][mode]["value"] for part in parts for mode in MODES]
        table.append([arm, *(f"{share:.1%}" for share in shares)])
    return format_table(table)


def format_kinds(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy by kind of question, answering only / explaining first."""
    kinds = list(next(iter(compared.values()))["kinds"])
    table = [["right, %", *kinds]]
    for arm, found in compared.items():
        pairs = [[found["kinds"][kind][mode]["value"] for mode in MODES] for kind in kinds]
        table.append([arm, *(" / ".join(f"{100 * share:.0f}" for share in pair) for pair in pairs)])
    legend = "; ".join(f"{kind}: {KINDS[kind].wanted}" for kind in kinds)
    return f"{format_table(table)}\n\n{legend}"


def format_explanations(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """What explanations get right of the choices; a verdict that is guessed is right in 50 %."""
    heads = {
        "line": "judged",
        "needed": "with its fact",
        "wrong": "wrong fact",
        "other": "another fact",
        "none": "no fact",
        "verdict": "verdict, fact told",
        "follows": "ends as judged",
    }
    table = [["explanations, %", *heads.values()]]
    for arm, found in compared.items():
        shares = [found["explanations"][name] for name in heads]
        table.append([arm, *("-" if share is None else f"{100 * share:.0f}" for share in shares)])
    return format_table(table)


def average_runs(rows: Sequence[Row]) -> dict[str, dict[str, Mean]]:
    """By arm, accuracies, differences and gains as means over runs, with Student's intervals."""
    return {
        arm: {name: average(own, ["arm"], name)[arm,] for name in _OVER_RUNS if name in own[0]}
        for arm, own in _by_arm(rows).items()
    }


def format_runs(over_runs: Mapping[str, Mapping[str, Mean]]) -> str:
    """Accuracies, differences and gains as means over runs."""
    table = [["means over runs", *_OVER_RUNS]]
    for arm, means in over_runs.items():
        table.append([arm, *(str(means.get(name, "-")) for name in _OVER_RUNS)])
    return f"{format_table(table)}\n\ngain: less that of study.start with the same seed"


def format_contrasts(contrasts: Sequence[Mapping[str, Any]]) -> str:
    """Arms against each other, over questions and over runs."""
    measures = (EXPLAIN_FIRST, "difference")
    table = [["arm less arm", *(x for name in measures for x in (name, "over runs"))]]
    for found in contrasts:
        cells = [f"{found['arm']} less {found['less']}"]
        for name in measures:
            mean = estimate_mean([100 * gain for gain in found["runs"][name]])
            half = f" ± {mean.half:.1f}" if mean.count > 1 else ""
            cells += [_say(found[name]), f"{mean.value:+.1f}{half}"]
        table.append(cells)
    return format_table(table)


def _say(estimate: Mapping[str, float]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {
        name: [row for row in rows if row["arm"] == name]
        for name in dict.fromkeys(row["arm"] for row in rows)
    }


def _parse(argv: list[str]) -> tuple[str, list[str]]:
    parser = cli.Parser(
        prog="python -m rpo_jax.study",
        description=__doc__,
        epilog="--config.field=value overrides a field in every arm, also where arms() sets it",
    )
    parser.add_argument("--config", default=DEFAULT, metavar="FILE.py", help="default: %(default)s")
    args, overrides = parser.parse_overrides(argv)
    return args.config, overrides


if __name__ == "__main__":
    with cli.exit_on_error():
        main(sys.argv[1:])
