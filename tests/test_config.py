"""Strict configuration: every mistake has its own message, every field does something."""

import dataclasses
import re
from pathlib import Path

import pytest

from rpo_jax import cli
from rpo_jax.config import Mesh, defaults, describe, field_names, resolve, to_dict
from rpo_jax.errors import UserError

REPO = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPO / "configs").glob("*.py"))


def complete():
    config = defaults()
    config.stage, config.name, config.model.shape = "cpt", "x", "laptop-1m"
    config.train.steps, config.train.batch_rows = 10, 4
    config.data.source = "fictional"
    return config


def errors_of(change):
    config = complete().to_dict()
    section = config
    *path, last = change[0].split(".")
    for name in path:
        section = section[name]
    section[last] = change[1]
    with pytest.raises(UserError) as error:
        resolve(config)
    return str(error.value)


def test_defaults_need_only_what_is_required():
    config = resolve(complete())
    assert config.rpo.beta == 0.1
    assert config.folder == Path("runs/x")
    assert resolve(to_dict(config)) == config


def test_missing_fields_are_all_named():
    with pytest.raises(UserError) as error:
        resolve(defaults())
    for name in ("stage", "name", "train.steps", "train.batch_rows"):
        assert f"config: {name} is missing: " in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rpo.aplha", 1.0), "rpo.aplha is not a field, did you mean alpha?"),
        (("zzz", 1), "zzz is not a field; known: stage, name"),
        (("rpo.alpha", "1"), "rpo.alpha='1': float is wanted, not str"),
        (("train.steps", 1.5), "train.steps=1.5: int is wanted, not float"),
        (("train.steps", True), "train.steps=True: int is wanted, not bool"),
        (("train.steps", 0), "train.steps=0: must be at least 1"),
        (("rpo.alpha", -0.5), "rpo.alpha=-0.5: must be at least 0.0"),
        (("rpo.beta", 0.0), "rpo.beta=0.0: must be above 0.0"),
        (("rpo.beta", float("nan")), "rpo.beta=nan: a finite number is wanted"),
        (("rpo.label_smoothing", 0.5), "rpo.label_smoothing=0.5: must be below 0.5"),
        (("data.max_dropped_share", 2), "data.max_dropped_share=2.0: must be at most 1.0"),
        (("stage", "sft"), "stage='sft': one of cpt, rpo is wanted"),
        (("data.train", "a.jsonl"), "data.train='a.jsonl': a list of str is wanted"),
        (("data.igakuqa.train_years", [2018, "x"]), "int is wanted, not str"),
        (("optim", 3), "optim is a section with fields of its own, not 3"),
        (("train.micro_batches", 3), "train.batch_rows=4 is not a multiple"),
        (("mesh.fsdp", -1), "at most one axis may be -1"),
        (("mesh.fsdp", 0), "an axis has at least one device"),
        (
            ("optim.warmup_steps", 10),
            "optim.warmup_steps=10 leaves nothing of train.steps=10:",
        ),
        (("data.source", "files"), "data.train is empty: data.source=files needs files"),
        (("model.offload", True), "model.offload=True: remat='none' lets the compiler choose"),
        (("stage", "rpo"), "init_from is empty: stage=rpo prefers against the model it starts"),
        (("model.shape", ""), "model.shape is empty, and there is no init_from"),
        (("name", "a/b"), "name='a/b': a folder name is wanted"),
        (("rpo.reference", "live"), "rpo.reference='live' is the model without its adapters"),
        (("name", "data"), "name='data': a folder name is wanted, and not `data`"),
        (("rpo.beta", float("inf")), "rpo.beta=inf: a finite number is wanted"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_mistake_has_its_message(change, message):
    assert message in errors_of(change)


def test_an_exam_year_is_trained_on_or_held_out():
    config = complete()
    config.data.source = "igakuqa"
    config.data.igakuqa.heldout_years = (2018,)
    with pytest.raises(UserError, match=re.escape("[2018] is both trained on and held out")):
        resolve(config)


def test_help_tells_every_field():
    text = describe()
    sections = {name for name in field_names() if f"  {name}." in text}
    for name in set(field_names()) - sections:
        assert f"  {name}=" in text


def test_every_field_is_read_somewhere():
    """A field that no code reads is a promise that is not kept."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in (REPO / "rpo_jax").rglob("*.py")
        if path.name != "config.py"
    )
    own = (REPO / "rpo_jax/config.py").read_text(encoding="utf-8")
    leaves = {name.split(".")[-1] for name in field_names()}
    indirect = {"train", "heldout"}  # read by the name of the split
    unread = {
        leaf
        for leaf in leaves - indirect
        if not re.search(rf"\.{leaf}\b", source) and f"self.{leaf}" not in own
    }
    axes = {field.name for field in dataclasses.fields(Mesh)}  # read together, as a dict
    assert unread - axes == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configs_are_valid(path):
    config = cli.load_config(str(path))
    assert config.name.replace("-", "_") == path.stem
