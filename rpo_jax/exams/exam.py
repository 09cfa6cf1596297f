"""What an exam is besides its questions: where it comes from, and the rules it is marked by."""

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rpo_jax.errors import UserError
from rpo_jax.exams import known
from rpo_jax.exams.igakuqa import Question, read_demonstrations, read_questions

Ask = Callable[[Path, Sequence[int] | None], list[Question]]


@dataclass(frozen=True)
class Exam:
    """An exam; each module of `rpo_jax.exams.known` holds one as ``EXAM``.

    Attributes:
        name: the module's.
        title: for reports.
        source: where a copy is fetched.
        years: asked where none is named; empty: whatever the folder holds.
        dev_years: that a model in training may be asked; the others test what came of it.
        directory_variable: environment variable that names a copy; "": none.
        always_right: ids that count as right whatever is answered.
        required_sections: letters of the sections with an absolute pass mark; "": no such rule.
        required_share: of their points, to pass.
        general_pass: points that the other sections wanted in a year, as announced.
        shots: demonstrations that its prompts show by default.
        names: whether an answer without demonstrations is the text of a choice, not its letter,
            which networks of a few million weights do not learn to find.
        prohibited_from: so many prohibited choices fail a candidate; 0: no such rule.
        published: points that others reported a year, by model.
        read: the questions of a folder, in order.
        demonstrate: its worked examples.
    """

    name: str
    title: str
    source: str
    years: tuple[int, ...] = ()
    dev_years: tuple[int, ...] = ()
    directory_variable: str = ""
    always_right: frozenset[str] = frozenset()
    required_sections: str = ""
    required_share: float = 0.8
    general_pass: Mapping[int, int] = field(default_factory=dict)
    shots: int = 3
    names: bool = False
    prohibited_from: int = 0
    published: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    read: Ask = read_questions
    demonstrate: Callable[[Path], list[Question]] = read_demonstrations

    def find(self, directory: str | Path = "") -> Path:
        """The folder of a copy: `directory`, or the one that the environment names.

        Raises:
            UserError: neither is given.
        """
        named = str(directory) or os.environ.get(self.directory_variable, "")
        if not named:
            also = f", or set {self.directory_variable}" if self.directory_variable else ""
            raise UserError(
                f"the exam {self.name} is wanted (--exam): where is it? give --exam_dir{also}; it "
                f"comes from {self.source}. For the held-out measures of a run give --config, no "
                "--checkpoint"
            )
        return Path(named).expanduser()


def find_exam(name: str) -> Exam:
    """The exam of that name.

    Raises:
        UserError: there is none.
    """
    names = list_exams()
    if name not in names:
        raise UserError(f"--exam {name}: no such exam; known: {', '.join(names)}")
    exam = importlib.import_module(f"{known.__name__}.{name}").EXAM
    assert isinstance(exam, Exam) and exam.name == name, name
    return exam


def list_exams() -> list[str]:
    """The names of all exams."""
    return sorted(module.name for module in pkgutil.iter_modules(known.__path__))
