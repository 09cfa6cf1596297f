"""A model takes an exam: from a checkpoint to a report. The command is `rpo_jax.evaluate`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.config import resolve
from rpo_jax.errors import UserError
from rpo_jax.exams.asking import (
    ANSWER_ONLY,
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
)
from rpo_jax.exams.candidate import has_one_letter, make_answer, make_weigh
from rpo_jax.exams.exam import Exam
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.report import write_report
from rpo_jax.exams.responses import Response
from rpo_jax.exams.scoring import mark, tally_answers
from rpo_jax.exams.split import find_world
from rpo_jax.generation.batching import make_generate
from rpo_jax.training.opening import Opened, open_model
from rpo_jax.training.run import read_fingerprints, write_json
from rpo_jax.training.state import fingerprint_params


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
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, fsdp=-1))
    dtype: str = "float32"
    out: str = ""


def take_exam(folder: Path, plan: Plan) -> dict[str, Any]:
    """Asks what was not asked yet, weighs letters, and writes the report, which is returned.

    Raises:
        UserError: model or exam are missing or broken, the plan contradicts itself, or another
            sitting is in the way.
    """
    if len(set(plan.seeds)) > 1 and plan.drawing.temperature == 0:
        raise UserError(
            f"--seeds {','.join(map(str, plan.seeds))}: at --temperature 0 all seeds answer alike; "
            "give one seed, or a temperature"
        )
    directory = _find_directory(plan, folder)
    questions = choose_questions(
        plan.exam.read(directory, plan.years or plan.exam.years), plan.limit
    )
    paper = Paper(directory, tuple(questions), tuple(plan.exam.demonstrate(directory)))
    paper.list_asks(plan)  # a prompt that does not exist is told before the model is read
    model = open_model(folder, plan.mesh, plan.dtype)
    out = Path(plan.out) if plan.out else folder / "exams" / f"{plan.exam.name}-{model.step}"
    ask_paper(model, plan, paper, out)
    if plan.weigh:
        _weigh_letters(plan.exam, model, out, paper.questions, paper.demonstrations[: plan.shots])
    return write_report(plan.exam, [out])


@dataclass(frozen=True)
class Paper:
    """What is asked: the questions, from where, and the worked examples of the exam."""

    directory: Path
    questions: tuple[Question, ...]
    demonstrations: tuple[Question, ...]

    def list_asks(self, plan: Plan) -> list[Ask]:
        """Every question in every mode and with every seed.

        Raises:
            UserError: there is no such prompt.
        """
        shown = self.demonstrations[: plan.shots]
        return [
            Ask(question, mode, seed, find_prompt(mode, plan.shots).render(question, shown))
            for mode in plan.modes
            for seed in plan.seeds
            for question in self.questions
        ]


def ask_paper(
    model: Opened, plan: Plan, paper: Paper, out: Path, share: Share | None = None
) -> None:
    """Has a model answer what it did not answer yet, or its share of it; `out` is the sitting.

    Raises:
        UserError: another sitting is in the way, or questions that the model cannot be asked.
    """
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
    )
    open_sitting(out, sitting)
    share = share or Share()
    asks = paper.list_asks(plan)
    generate = make_generate(model.network, model.mesh, model.tokenizer, slots=plan.slots)
    answer = make_answer(generate, model.params, model.tokenizer, plan.drawing)
    total = len(share.take(asks))
    with tqdm(total=total, desc=plan.exam.name, unit=" answers", disable=None) as progress:
        ask_all(out, asks, answer, RunningScore(plan.exam, progress), share)


class RunningScore:
    """Shows how many points of those asked for so far were reached, by mode."""

    def __init__(self, exam: Exam, progress: Any):
        self._exam = exam
        self._progress = progress
        self._points: dict[str, list[int]] = {}

    def __call__(self, ask: Ask, response: Response) -> None:
        """Counts one answer."""
        one = mark(self._exam, ask.question, response)
        points = self._points.setdefault(ask.mode, [0, 0])
        points[0] += ask.question.points * one.extracted
        points[1] += ask.question.points
        self._progress.update()
        self._progress.set_postfix(
            {mode: f"{got}/{of}" for mode, (got, of) in self._points.items()}
        )


def _find_directory(plan: Plan, folder: Path) -> Path:
    """The exam's folder; that of a fictional world follows from the run that was trained on it."""
    run = folder / "run.json"
    if plan.exam.name == "fictional" and not plan.directory and run.is_file():
        config = resolve(json.loads(run.read_text(encoding="utf-8"))["config"])
        return find_world(config) / "exam"
    return plan.exam.find(plan.directory)


def _weigh_letters(
    exam: Exam,
    model: Opened,
    out: Path,
    questions: Sequence[Question],
    demonstrations: Sequence[Question],
) -> None:
    """Writes likelihood.json: the letter that the model finds likeliest, where one is asked."""
    if (out / "likelihood.json").exists():
        return
    style = find_prompt(ANSWER_ONLY, len(demonstrations))
    asked = [(q, style.render(q, demonstrations)) for q in questions if has_one_letter(q)]
    weigh = make_weigh(model.network, model.mesh, model.tokenizer, style)
    found = tqdm(weigh(model.params, asked), desc="letters", total=len(asked), disable=None)
    logps = {question.id: logps_M.tolist() for question, logps_M in found}
    letters = {
        q.id: (q.letters[max(enumerate(logps[q.id]), key=lambda x: x[1])[0]],) for q, _ in asked
    }
    tally = tally_answers(exam, [question for question, _ in asked], letters)
    write_json(out / "likelihood.json", {"prompt": style.name, **tally, "logps": logps})
