"""A model takes an exam: from a checkpoint to a report. The command is `rpo_jax.evaluate`."""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from tqdm import tqdm

from rpo_jax.config import Config, resolve
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError
from rpo_jax.exams.asking import (
    ANSWER_ONLY,
    EXPLAIN_FIRST,
    MODES,
    Ask,
    Drawing,
    Share,
    Sitting,
    ask_all,
    choose_questions,
    digest_questions,
    find_prompt,
    open_sitting,
    read_answers,
)
from rpo_jax.exams.candidate import has_one_letter, make_answer, make_weigh
from rpo_jax.exams.exam import Exam, find_exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.phrasing import Phrasing, find_phrasing
from rpo_jax.exams.prompts import PromptFormat
from rpo_jax.exams.report import write_report
from rpo_jax.exams.responses import Response
from rpo_jax.exams.scoring import mark, tally_answers
from rpo_jax.exams.split import find_world
from rpo_jax.generation.batching import make_generate
from rpo_jax.model.qwen2 import Network, Params
from rpo_jax.training.checkpoint import name_score
from rpo_jax.training.loop import Look
from rpo_jax.training.opening import Opened, find_model, open_model, read_end_ids, take_apart
from rpo_jax.training.run import read_fingerprints
from rpo_jax.training.state import fingerprint_params
from rpo_jax.writing import write_json

LOGGED_RATES = ("parse", "run_on", "stop", "truncation")  # of a dev exam


@dataclass(frozen=True)
class Plan:
    """How a model takes an exam.

    Attributes:
        exam: which one.
        directory: of its years; "": as the environment, or the run of a fictional world, says.
        years: empty: those of the exam.
        limit: so many questions, evenly spread; 0: all.
        modes: ways of asking.
        shots: demonstrations in the prompt.
        seeds: each asks everything once; more than one only where answers are drawn by chance.
        drawing: how answers are drawn.
        weigh: also compare the likelihoods of single letters.
        slots: answers that are written at a time.
        chat: whether the model's chat template puts the questions, see `find_phrasing`.
        step: of the model's checkpoint; None: the newest.
        mesh: devices an axis.
        dtype: of weights and matmuls.
        out: the sitting's folder; "": in the model's folder.
    """

    exam: Exam
    directory: str = ""
    years: tuple[int, ...] = ()
    limit: int = 0
    modes: tuple[str, ...] = MODES
    shots: int = 3
    seeds: tuple[int, ...] = (0,)
    drawing: Drawing = field(default_factory=Drawing)
    weigh: bool = True
    slots: int = 16
    chat: str = "auto"
    step: int | None = None
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, fsdp=-1))
    dtype: str = "float32"
    out: str = ""


@dataclass(frozen=True)
class Paper:
    """What is asked: the questions, from where, and the worked examples of the exam."""

    directory: Path
    questions: tuple[Question, ...]
    demonstrations: tuple[Question, ...]

    def list_asks(self, plan: Plan, phrasing: Phrasing | None = None) -> list[Ask]:
        """Every question in every mode and with every seed; by default in plain text.

        Raises:
            UserError: there is no such prompt.
        """
        render = phrasing.render if phrasing else PromptFormat.render
        by_template = bool(phrasing and phrasing.chat)
        shown = self.demonstrations[: plan.shots]
        return [
            Ask(question, mode, seed, render(style, question, shown))
            for mode in plan.modes
            for style in [find_prompt(plan.exam, mode, plan.shots, by_template)]
            for seed in plan.seeds
            for question in self.questions
        ]


def take_exam(folder: Path, plan: Plan, share: Share | None = None) -> dict[str, Any] | None:
    """Asks what was not asked yet, weighs letters, and writes the report, which is returned.

    Of several hosts, each does its share, and the first weighs the letters; whoever finds that all
    is answered makes the report, the others return None.

    Raises:
        UserError: model or exam are missing or broken, the plan contradicts itself, or another
            sitting is in the way.
    """
    if len(set(plan.seeds)) > 1 and plan.drawing.temperature == 0:
        raise UserError(
            f"--seeds {','.join(map(str, plan.seeds))}: at --temperature 0 all seeds answer alike; "
            "give one seed, or a temperature"
        )
    find_model(folder)  # before the exam is looked for
    run = folder / "run.json"
    config = resolve(json.loads(run.read_text("utf-8"))["config"]) if run.is_file() else None
    paper = lay_out(plan, config)
    logging.info("%s: reading the weights", folder)
    model = open_model(folder, plan.mesh, plan.dtype, plan.step)
    out = Path(plan.out) if plan.out else folder / "exams" / f"{plan.exam.name}-{model.step}"
    share = share or Share()
    phrasing = open_paper(model, plan, paper, out)
    if plan.weigh and share.number == 0:
        _weigh_letters(plan, model, phrasing, paper, out)
    ask_paper(take_apart(model), phrasing, plan, paper, out, share)
    answered = (read_answers(out, mode, seed) for mode in plan.modes for seed in plan.seeds)
    if any(len(answers) < len(paper.questions) for answers in answered):
        return None
    return write_report(plan.exam, [out])


def lay_out(plan: Plan, run: Config | None) -> Paper:
    """Reads the exam; that of a fictional world follows from the run that was trained on it.

    Raises:
        UserError: it is missing or broken, or there is no such prompt.
    """
    for mode in plan.modes:
        find_prompt(plan.exam, mode, plan.shots)
    if plan.exam.name == "fictional" and not plan.directory and run is not None:
        directory = find_world(run) / "exam"
    else:
        directory = plan.exam.find(plan.directory)
    questions = plan.exam.read(directory, plan.years or plan.exam.years)
    return Paper(
        directory,
        tuple(choose_questions(questions, plan.limit)),
        tuple(plan.exam.demonstrate(directory)),
    )


def open_paper(
    model: Opened, plan: Plan, paper: Paper, out: Path, restart: bool = False
) -> Phrasing:
    """Starts a model's sitting in the folder `out`, or goes on with it; how the model is asked.

    With `restart`, another sitting there is thrown away, not refused.

    Raises:
        UserError: another sitting is in the way, or the model has no chat template that is wanted.
    """
    phrasing = find_phrasing(model.folder / "model", model.tokenizer, plan.chat)
    sitting = Sitting(
        exam=plan.exam.name,
        exam_dir=str(paper.directory.absolute()),
        years=tuple(sorted({question.year or 0 for question in paper.questions})),
        questions=digest_questions(paper.questions, paper.demonstrations),
        asked=len(paper.questions),
        model=str(model.folder.absolute()),
        step=model.step,
        weights=fingerprint_params(model.params),
        shots=plan.shots,
        drawing=plan.drawing,
        data=read_fingerprints(model.folder),
        chat=phrasing.chat.fingerprint if phrasing.chat else "",
        modes=plan.modes,
    )
    open_sitting(out, sitting, restart)
    return phrasing


def ask_paper(
    model: Opened,
    phrasing: Phrasing,
    plan: Plan,
    paper: Paper,
    out: Path,
    share: Share | None = None,
) -> None:
    """Has a model answer what it did not answer yet, or its share of it; `out` is the sitting.

    Raises:
        UserError: questions that the model cannot be asked.
    """
    share = share or Share()
    asks = paper.list_asks(plan, phrasing)
    generate = make_generate(
        model.network, model.mesh, model.tokenizer, end_ids=model.end_ids, slots=plan.slots
    )
    answer = make_answer(generate, model.params, phrasing, plan.drawing)
    total = len(share.take(asks))
    logging.info("%s: %d answers; the first ones wait for the compiler", out, total)
    with tqdm(total=total, desc=plan.exam.name, unit=" answers", disable=None) as progress:
        ask_all(out, asks, answer, RunningScore(plan.exam, progress), share)


def make_dev_looks(
    config: Config, network: Network, mesh: Mesh, tokenizer: Tokenizer
) -> list[Look]:
    """The look at a model in training that a config's dev exam is; [] where it has none.

    The answers of each step, and their report, lie in the run's exams/dev-<step>.

    Raises:
        UserError: a year is asked for that tests, or that the run trains on; or as `lay_out`.
    """
    if not config.exam.name:
        return []
    plan = plan_dev_exam(config)
    paper = lay_out(plan, config if _find_source(config) == "fictional" else None)

    def measure(params: Params, step: int) -> dict[str, float]:
        model = Opened(
            config.folder, step, network, params, tokenizer, mesh, read_end_ids(config.folder)
        )
        out = config.folder / "exams" / f"dev-{step}"
        phrasing = open_paper(model, plan, paper, out, restart=True)
        ask_paper(model, phrasing, plan, paper, out)
        (found,) = write_report(plan.exam, [out])["models"]
        return {
            name: value
            for mode in plan.modes
            for name, value in _name_scores(mode, found["modes"][mode]["seeds"]["0"]).items()
        }

    best = config.checkpoint.best
    logged = name_score(plan.modes[0])
    return [Look(config.exam.every_steps, measure, logged, name_score(best) if best else "")]


def plan_dev_exam(config: Config) -> Plan:
    """How a config's dev exam is asked.

    Raises:
        UserError: a year is asked for that tests, or that the run trains on.
    """
    asked, exam = config.exam, find_exam(config.exam.name)
    learns = _find_source(config) == exam.name != "fictional"
    trained = config.data.igakuqa.train_years if learns else ()
    allowed = tuple(year for year in exam.dev_years if year not in trained)
    years = asked.years or allowed
    if not years or not set(years) <= set(allowed):
        raise UserError(
            f"exam.years={years}: a model in training is asked dev questions only, none that test "
            f"it and none that it is trained on; of {exam.name} these years are left: "
            f"{', '.join(map(str, allowed)) or 'none'}"
        )
    return Plan(
        exam,
        directory=asked.directory,
        years=years,
        limit=asked.questions,
        modes=asked.modes,
        shots=exam.shots,
        drawing=Drawing({ANSWER_ONLY: asked.answer_tokens, EXPLAIN_FIRST: asked.explain_tokens}),
        weigh=False,
        slots=asked.slots,
    )


def _find_source(config: Config) -> str:
    """The exam or world that a run learns from."""
    data = config.data
    return data.sample.exam if data.source == "candidates" else data.source


def _name_scores(mode: str, score: dict[str, Any]) -> dict[str, float]:
    rates = {f"exam/{mode}/{name}": score["rates"][name] for name in LOGGED_RATES}
    official = {f"exam/{mode}/official_share": score["official"]["share"]}
    return {name_score(mode): score["extracted"]["share"], **official, **rates}


class RunningScore:
    """Shows how many points of those asked for so far were reached, by mode.

    On a bar; where there is no terminal to draw it on, on a line of the log now and then.
    """

    def __init__(self, exam: Exam, progress: Any, every_seconds: float = 10.0):
        self._exam = exam
        self._progress = progress
        self._every_seconds = every_seconds
        self._told = time.monotonic()
        self._count = 0
        self._points: dict[str, list[int]] = {}

    def __call__(self, ask: Ask, response: Response) -> None:
        """Counts one answer."""
        one = mark(self._exam, ask.question, response)
        points = self._points.setdefault(ask.mode, [0, 0])
        points[0] += ask.question.points * one.extracted
        points[1] += ask.question.points
        self._count += 1
        shown = {mode: f"{got}/{of}" for mode, (got, of) in self._points.items()}
        self._progress.update()
        self._progress.set_postfix(shown)
        now = time.monotonic()
        due = self._count == self._progress.total or now > self._told + self._every_seconds
        if self._progress.disable and due:
            self._told = now
            reached = ", ".join(f"{mode} {points}" for mode, points in shown.items())
            of = f"{self._count} of {self._progress.total}"
            logging.info("%s: %s answers; points %s", self._exam.name, of, reached)


def _weigh_letters(plan: Plan, model: Opened, phrasing: Phrasing, paper: Paper, out: Path) -> None:
    """Writes likelihood.json: the letter that the model finds likeliest, where one is asked."""
    style = find_prompt(plan.exam, ANSWER_ONLY, plan.shots, phrasing.chat is not None)
    if style.names or (out / "likelihood.json").exists():
        return
    weighed = [question for question in paper.questions if has_one_letter(question)]
    shown = paper.demonstrations[: plan.shots]
    asked = [(question, phrasing.render(style, question, shown)) for question in weighed]
    logging.info("%s: weighing the letters of %d questions", out, len(asked))
    weigh = make_weigh(model.network, model.mesh, phrasing, style)
    found = tqdm(weigh(model.params, asked), desc="letters", total=len(asked), disable=None)
    logps = {question.id: logps_M.tolist() for question, logps_M in found}
    letters = {
        q.id: (q.letters[max(enumerate(logps[q.id]), key=lambda x: x[1])[0]],) for q in weighed
    }
    tally = tally_answers(plan.exam, weighed, letters)
    write_json(out / "likelihood.json", {"prompt": style.name, **tally, "logps": logps})
