"""Which exam is kept out of text: named by a config, found on a machine, or told to be missing."""

import re

import pytest

from rpo_jax.cli import load_config
from rpo_jax.errors import UserError
from rpo_jax.exams.sources import find_questions
from rpo_jax.inputs import list_inputs
from tests.processes import REPO
from tests.sittings import make_exam

# ml_collections loads config files by a method that Python 3.11 calls deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")

CONFIGS = sorted(REPO.glob("configs/qwen25_*_cpt*.py"))


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    monkeypatch.delenv("IGAKUQA_DIR", raising=False)


def load(exams, **more):
    """A config on files with other exams."""
    fields = {"exams": f"--config.data.corpus.exams={exams}"}
    fields |= {name: f"--config.data.{name.replace('__', '.')}={x}" for name, x in more.items()}
    return load_config(str(REPO / "configs/qwen25_mid_cpt.py"), list(fields.values()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_released_sizes_name_the_exam(path):
    config = load_config(str(path))
    assert config.data.corpus.exams == ("igakuqa",)
    told = r"igakuqa are to be kept out .*: set IGAKUQA_DIR, or data\.igakuqa\.directory, to "
    with pytest.raises(UserError, match=told):
        find_questions(config)
    assert re.search(told, str(list_inputs(config)["data.corpus.exams igakuqa"]))
    anyway = load_config(str(path), ["--config.data.corpus.decontaminate=False"])
    assert find_questions(anyway) is None


def test_the_exam_is_found_by_the_field_as_by_the_variable(tmp_path, monkeypatch):
    folder, questions = make_exam(tmp_path)
    name = f"igakuqa:{questions[0].year}"
    field = load((name,), igakuqa__directory=folder)
    by_field = find_questions(field)
    assert "questions to keep out" in list_inputs(field)[f"data.corpus.exams {name}"]
    monkeypatch.setenv("IGAKUQA_DIR", str(folder))
    by_variable = find_questions(load((name,)))
    assert len(by_field) == len(questions) and by_field.fingerprint == by_variable.fingerprint


def test_it_is_warned_of_text_that_nothing_is_kept_out_of(caplog):
    assert find_questions(load(())) is None
    assert "warning: no evaluation questions are known, so NONE ARE KEPT OUT" in caplog.text
