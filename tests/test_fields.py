"""Every field of a config changes something: each is changed where it acts, and is seen there.

A table for each place: what is looked at, the config it starts from, and for each field a value
that must make a difference. A field that is in no table fails the first test.
"""

import contextlib
import itertools
import json
import os
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from rpo_jax.config import Config, Mesh, defaults, field_names, resolve, to_dict
from rpo_jax.data.records import open_records
from rpo_jax.data.tokenizer import train_sentencepiece
from rpo_jax.errors import UserError
from rpo_jax.examine import make_dev_looks, plan_dev_exam
from rpo_jax.exams.split import split_exam
from rpo_jax.iterate import list_rounds
from rpo_jax.model.qwen2 import make_network
from rpo_jax.pair import make_pairs
from rpo_jax.prepare import load_tokenizer, prepare
from rpo_jax.sample import _plan
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.checkpoint import open_checkpoints, save_state
from rpo_jax.training.metrics import MetricLog
from rpo_jax.training.objective import make_hyper
from rpo_jax.training.origin import first_trained
from rpo_jax.training.programs import abstract_run, lower_step
from rpo_jax.training.run import find_shape, read_metrics
from rpo_jax.training.state import (
    abstract_state,
    abstract_weights,
    make_params,
    split_params,
    start_from,
)
from rpo_jax.training.workload import make_workload
from tests.test_generation import TOKENIZER
from tests.test_pair import make_answers
from tests.test_text_sets import QUESTION, make_text
from tests.test_train import RPO, rpo_overrides, run, workdir
from tests.tiny import NETWORK, SHAPE

__all__ = ["workdir"]  # the fixture

# Fields whose effect only another test can show, and the words that it sets them by.
ELSEWHERE = {
    "name": ("test_train.py", "name="),
    "init_from": ("test_train.py", "init_from="),
    "lora.previous": ("test_lora_runs.py", '"lora__previous"'),
    "data.workers": ("test_text_sets.py", "workers="),
    "workdir": ("test_train.py", "workdir"),
    "exam.name": ("test_dev_exam.py", "exam__name"),
    "data.fictional.size": ("test_fictional.py", "SIZES"),
    "tokenizer.end_of_text": ("test_tokenizer.py", '"<|im_end|>")'),
    "study.worlds": ("test_study.py", "--config.study.worlds=(3,1000)"),
    "study.seeds": ("test_study.py", "--config.study.seeds=(0,7)"),
    "study.start": ("test_study.py", "--config.study.start=rpo"),
    "study.unexamined": ("test_study.py", "--config.study.unexamined=('cpt',)"),
}


REPO = Path(__file__).resolve().parents[1]


def config_of(*changes: dict) -> Config:
    values = defaults().to_dict()
    base = {"stage": "cpt", "name": "x", "train.steps": 10, "train.batch_rows": 4}
    base |= {"model.shape": "laptop-1m", "data.source": "fictional", "data.fictional.size": "tiny"}
    for name, value in itertools.chain(base.items(), *(change.items() for change in changes)):
        section = values
        *path, last = name.split(".")
        for key in path:
            section = section[key]
        section[last] = value
    return resolve(values)


def work_of(config: Config):
    network = make_network(SHAPE, config.model, config.lora)
    return make_workload(config, network, make_mesh(config.mesh, jax.devices()[:4]))


def look_at_step(config: Config, _) -> str:
    """The program of a step."""
    work = work_of(config)
    return lower_step(work, *abstract_run(work)).as_text()


def look_at_numbers(config: Config, _) -> dict[str, float]:
    """What the program of a step is given, of the config."""
    hyper = make_hyper(config.rpo, config.optim.learning_rate)
    return {name: float(value) for name, value in hyper.items()}


def look_at_weights(config: Config, _) -> dict[str, float]:
    """The weights, or adapters, that a run begins with."""
    work = work_of(config)
    with jax.set_mesh(work.mesh):
        _, abstract = split_params(abstract_weights(work.network, work.mesh))
        frozen = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), abstract)
        trained = first_trained(config, work.network, work.mesh, frozen)
    return {
        jax.tree_util.keystr(path): float(np.abs(leaf).sum())
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained)
    }


def look_at_shape(config: Config, _):
    """The network's shape."""
    return find_shape(config)


def look_at_records(config: Config, folder) -> dict:
    """What is trained on and held out."""
    made = prepare(config, load_tokenizer(config)).by_split()
    return {
        split: [[np.asarray(value).tolist() for value in record.values()] for record in records]
        for split, records in ((split, open_records(path)) for split, path in made.items())
    }


def look_at_pairs(config: Config, folder) -> list[str]:
    """The pairs that are made of answers."""
    made = make_pairs(config)
    return [(made / f"{split}.jsonl").read_text() for split in ("train", "heldout")]


def look_at_drawing(config: Config, folder) -> str:
    """How a model is asked for answers."""
    return repr(_plan(config, split_exam(config)))


def look_at_dev_exam(config: Config, folder) -> str:
    """How a model in training is examined."""
    (look,) = make_dev_looks(config, NETWORK, make_mesh(config.mesh), TOKENIZER)
    return f"{plan_dev_exam(config)} {look.every_steps} {look.selects}"


def look_at_logs(config: Config, folder) -> list[str]:
    """What is logged to."""
    with tempfile.TemporaryDirectory() as logs, MetricLog(Path(logs), config.log, 0, {}):
        return sorted(os.listdir(logs))


def look_at_checkpoints(config: Config, folder) -> list[str]:
    """Where checkpoints lie, and how many are kept."""
    tx, mesh = optax.sgd(0.1), make_mesh(Mesh(), jax.devices()[:1])
    with (
        jax.set_mesh(mesh),
        tempfile.TemporaryDirectory() as there,
        contextlib.chdir(there),
        open_checkpoints(Path(there) / config.name, config.checkpoint) as checkpoints,
    ):
        state = start_from(make_params(NETWORK, mesh, 0), tx, abstract_state(NETWORK, tx, mesh))
        for step in range(4):
            save_state(checkpoints, replace(state, step=jax.numpy.int32(step)))
        checkpoints.wait()
        return sorted(str(path) for path in Path().glob("**/*") if path.name.isdecimal())


def look_at_rounds(config: Config, folder) -> list[Config]:
    return list(list_rounds(config))


PAIRS = {
    "stage": "rpo",
    "init_from": "nowhere",
    "data.prompt_length": 12,
    "data.response_length": 6,
    "train.loss_chunk": 5,
    "optim.warmup_steps": 2,
    "optim.weight_decay": 0.1,
}
ADAPTERS = {**PAIRS, "lora.rank": 2}
TEXT = {"data.row_length": 24, "train.loss_chunk": 5}
CANDIDATES = {
    "stage": "rpo",
    "init_from": "nowhere",
    "data.source": "candidates",
    "data.sample.answers": 0,
    "data.sample.shots": 0,
    "data.sample.modes": ("answer_only", "explain_first"),
    "data.sample.files": ("answers.jsonl",),
}
DRAWN = {**CANDIDATES, "data.sample.answers": 2, "data.igakuqa.directory": "exam"}
FILES = {
    "data.source": "files",
    "data.train": ("a.jsonl", "b.jsonl"),
    "data.heldout": ("held.jsonl",),
    "data.row_length": 64,
    "data.corpus.exams": ("questions.jsonl",),
    "data.corpus.max_filtered_share": 1.0,
    "data.max_dropped_share": 1.0,
    "tokenizer.path": "one/tokenizer.model",
}
PAIR_FILES = {
    **FILES,
    "stage": "rpo",
    "init_from": "nowhere",
    "data.train": ("pairs.jsonl",),
    "data.heldout": ("held_pairs.jsonl",),
    "data.prompt_length": 8,
    "data.response_length": 8,
}
IGAKUQA = {
    "data.source": "igakuqa",
    "data.igakuqa.directory": "exam",
    "data.igakuqa.train_years": (2018,),
    "data.igakuqa.heldout_years": (2019,),
    "tokenizer.path": "one/tokenizer.model",
}
WORLD = {"data.row_length": 64, "tokenizer.train_vocab_size": 600}

TABLES = [
    (
        look_at_step,
        {**TEXT, "model.remat": "dots", "init_from": "nowhere"},
        {
            "stage": "rpo",
            "model.param_dtype": "bfloat16",
            "model.compute_dtype": "bfloat16",
            "model.remat": "full",
            "model.offload": True,
            "model.scan_layers": False,
            "model.attention": "blocks",
            "model.used_vocab_size": 90,
            "data.row_length": 32,
            "train.batch_rows": 8,
            "train.loss_chunk": 7,
            "train.keep_logits": True,
        },
    ),
    (
        look_at_step,
        PAIRS,
        {
            "data.prompt_length": 13,
            "data.response_length": 7,
            "data.pairs_per_row": 2,
            "data.row_sizes": 2,
            "rpo.preference": "ipo",
            "rpo.length_normalised": True,
            "rpo.nll_tokens": "prompt+completion",
            "rpo.nll_norm": "batch_tokens",
            "rpo.share_prefix": False,
            "lora.rank": 2,
            "optim.schedule": "constant",
            "optim.warmup_steps": 3,
            "optim.final_fraction": 0.2,
            "optim.b1": 0.8,
            "optim.b2": 0.9,
            "optim.eps": 1e-6,
            "optim.weight_decay": 0.2,
            "optim.clip_norm": 0.5,
            "train.steps": 20,
        },
    ),
    (look_at_step, {**PAIRS, "train.batch_rows": 8}, {"train.micro_batches": 2}),
    (
        look_at_step,
        ADAPTERS,
        {
            "rpo.reference": "live",
            "lora.alpha": 8.0,
            "lora.targets": ("q", "v"),
            "lora.dropout": 0.1,
            "lora.quantize": "int8",
            "lora.trained_tokens": ("a",),
        },
    ),
    (
        look_at_step,
        {**PAIRS, "mesh.data": 1, "mesh.fsdp": -1},
        {"mesh.data": 2, "mesh.seq": 2, "mesh.tensor": 2},
    ),
    (look_at_step, PAIRS, {"mesh.fsdp": 2}),
    (
        look_at_numbers,
        PAIRS,
        {
            "rpo.alpha": 0.5,
            "rpo.beta": 0.2,
            "rpo.label_smoothing": 0.1,
            "optim.learning_rate": 1e-3,
        },
    ),
    (look_at_numbers, {**PAIRS, "rpo.preference": "simpo"}, {"rpo.gamma": 0.6}),
    (look_at_weights, TEXT, {"seed": 1}),
    (look_at_weights, {**ADAPTERS, "lora.targets": ("q",)}, {"lora.init": "a_zero"}),
    (look_at_shape, {}, {"model.shape": "qwen2.5-0.5b"}),
    (
        look_at_records,
        FILES,
        {
            "data.train": ("a.jsonl",),
            "data.heldout": ("general.jsonl",),
            "data.general": ("general.jsonl",),
            "data.corpus.text_field": "body",
            "data.corpus.id_field": "key",
            "data.corpus.epochs": (2.0, 1.0),
            "data.corpus.weights": (0.1, 0.9),
            "data.corpus.heldout_share": 0.3,
            "data.corpus.min_characters": 30,
            "data.corpus.max_characters": 100,
            "data.corpus.min_kana_share": 0.5,
            "data.corpus.max_repetition": 0.3,
            "data.corpus.boilerplate_lines": ("^広告",),
            "data.corpus.drop_copies": False,
            "data.corpus.near_copies": 0.5,
            "data.corpus.decontaminate": False,
            "data.corpus.exams": (),
            "data.corpus.max_overlap": 0.95,
            "data.corpus.long_documents": "best_fit",
            "data.corpus.shard_mib": 1,
            "data.corpus.max_filtered_share": 0.0,
            "tokenizer.path": "two/tokenizer.model",
        },
    ),
    (look_at_records, PAIR_FILES, {"data.max_dropped_share": 0.0}),
    (
        look_at_records,
        WORLD,
        {
            "data.fictional.seed": 1,
            "data.fictional.text": "general",
            "tokenizer.train_vocab_size": 610,
        },
    ),
    (
        look_at_records,
        {**IGAKUQA, "data.source": "fictional"},
        {"data.source": "igakuqa"},
    ),
    (
        look_at_records,
        IGAKUQA,
        {
            "data.igakuqa.directory": "exam2",
            "data.igakuqa.train_years": (2020,),
            "data.igakuqa.heldout_years": (2020,),
        },
    ),
    (
        look_at_pairs,
        CANDIDATES,
        {
            "data.sample.limit": 8,
            "data.sample.files": ("answers2.jsonl",),
            "data.sample.modes": ("answer_only",),
            "data.sample.shots": 3,
            "data.pair.strategy": "right_over_wrong",
            "data.pair.pairs_per_question": 1,
            "data.pair.explanations": ("truth.jsonl",),
            "data.pair.max_length_ratio": 1.1,
            "data.pair.max_similarity": 0.3,
            "data.pair.max_letter_ratio": 1.0,
            "data.pair.heldout_share": 0.5,
            "data.pair.leak_share": 0.6,
        },
    ),
    (look_at_pairs, {**CANDIDATES, "workdir": "anew"}, {"data.pair.max_left_out_share": 0.0}),
    (
        look_at_drawing,
        DRAWN,
        {
            "data.sample.exam": "igakuqa",
            "data.sample.answers": 4,
            "data.sample.temperature": 0.5,
            "data.sample.top_k": 5,
            "data.sample.top_p": 0.5,
            "data.sample.answer_tokens": 5,
            "data.sample.explain_tokens": 5,
            "data.sample.first_seed": 5,
            "data.sample.slots": 5,
        },
    ),
    (
        look_at_dev_exam,
        {"exam.name": "igakuqa", "exam.directory": "exam"},
        {
            "exam.directory": "exam2",
            "exam.years": (2018,),
            "exam.questions": 5,
            "exam.every_steps": 5,
            "exam.modes": ("answer_only",),
            "exam.answer_tokens": 5,
            "exam.explain_tokens": 5,
            "exam.slots": 5,
            "checkpoint.best": "answer_only",
        },
    ),
    (look_at_logs, {}, {"log.tensorboard": False, "log.wandb_project": "ours"}),
    (look_at_checkpoints, {}, {"checkpoint.keep": 3, "checkpoint.directory": "away"}),
    (look_at_rounds, DRAWN, {"rounds.count": 3, "rounds.temperatures": (0.1,)}),
]
# These stop a run, or what they need is not installed here.
STOPS = {
    "log.wandb_project",
    "data.max_dropped_share",
    "data.corpus.max_filtered_share",
    "data.pair.max_left_out_share",
}


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents, pairs, answers and exams, with what each field sorts out among them."""
    folder = tmp_path_factory.mktemp("fields")
    rng = random.Random(0)
    texts = [make_text(rng, 60) for _ in range(40)]
    for name, size in (("one", 400), ("two", 420)):
        train_sentencepiece([make_text(rng, 500) for _ in range(20)], size, folder / name)
    near = texts[3][:30] + "変" + texts[3][31:]
    odd = ["短い", "あいうえお" * 8, make_text(rng, 300), "english words only, of no kana at all"]
    odd += [texts[0], near, "広告\n" + texts[5], make_text(rng, 5) + QUESTION]
    odd.append(make_text(rng, 30) + QUESTION[: len(QUESTION) * 4 // 5])
    for name, documents in {
        "a": [*texts[:20], *odd],
        "b": texts[20:],
        "held": [make_text(rng, 60) for _ in range(4)],
        "general": [make_text(rng, 60) for _ in range(4)],
    }.items():
        write(
            folder / f"{name}.jsonl",
            [
                {
                    "id": f"{name}{i}",
                    "key": f"k-{name}{i}",
                    "text": text,
                    "body": text[::-1],
                    "pad": "x" * 40000,
                }
                for i, text in enumerate(documents)
            ],
        )
    write(folder / "questions.jsonl", [{"id": "q", "text": QUESTION}])
    for name in ("pairs", "held_pairs"):
        prompts = [make_text(rng, length) for length in (4, 5, 60)]
        write(
            folder / f"{name}.jsonl",
            [
                {"id": f"{i}", "prompt": prompt, "chosen": "あ", "rejected": "い"}
                for i, prompt in enumerate(prompts)
            ],
        )
    taught = split_exam(config_of(CANDIDATES, {"workdir": str(folder / "runs")})).taught
    for name, seed in (("answers", 0), ("answers2", 1)):
        write(folder / f"{name}.jsonl", make_answers(taught, seed))
    truth = [{"id": question.id, "text": "これが説明である。"} for question in taught]
    write(folder / "truth.jsonl", truth)
    for name, letter in (("exam", "b"), ("exam2", "c")):
        for year in range(2018, 2023):
            write_year(folder / name, year, letter)
    return folder


def write_year(exam, year, letter):
    (exam / str(year)).mkdir(parents=True)
    session = year - 1906
    write(
        exam / str(year) / f"{session}-A.jsonl",
        [
            {
                "problem_id": f"{session}A{i}",
                "problem_text": f"{year}の{i}番目の問い。どれか。",
                "choices": ["い", "ろ", "は", "に", "ほ"],
                "text_only": True,
                "answer": [letter],
                "points": "1",
            }
            for i in range(1, 6)
        ],
    )
    write(exam / "prompt.jsonl", [])


CASES = [
    pytest.param(look, base, field, value, id=field)
    for look, base, fields in TABLES
    for field, value in fields.items()
]


def test_every_field_is_in_a_table():
    known = {name for name in field_names() if not isinstance(leaf(name), dict)}
    shown = {field for _, _, fields in TABLES for field in fields} | TRACES.keys()
    assert known - shown - ELSEWHERE.keys() == set()
    assert (shown | ELSEWHERE.keys()) - known == set()


def leaf(name):
    value = to_dict(config_of())
    for key in name.split("."):
        value = value[key]
    return value


@pytest.mark.parametrize(("file", "words"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_is_seen_elsewhere_is_set_there(file, words):
    assert words in (REPO / "tests" / file).read_text("utf-8")


SEEN = {}  # of the config that a table starts from


@pytest.mark.full
@pytest.mark.parametrize(("look", "base", "field", "value"), CASES)
def test_a_field_changes_what_is_seen(look, base, field, value, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name in ("IGAKUQA_DIR", "QWEN_TOKENIZER"):
        monkeypatch.delenv(name, raising=False)

    def see(*changes):
        try:
            return look(config_of(base, *changes), folder)
        except UserError as error:
            assert field in STOPS and field in str(error)
            return str(error)

    changed = see({field: value})  # first: what is made is not checked again
    if (key := id(base), look) not in SEEN:
        SEEN[key, look] = see()
    assert SEEN[key, look] != changed


def list_steps(folder, name):
    """The steps under which a scalar is logged."""
    return [line["step"] for line in read_metrics(folder) if name in line]


# What only whole runs show: the value in the second one, and what it leaves there.
TRACES = {
    "train.log_every_steps": (3, lambda folder: list_steps(folder, "tokens_per_s")),
    "train.eval_every_steps": (4, lambda folder: list_steps(folder, "heldout/nll")),
    "train.eval_rows": (2, lambda folder: read_metrics(folder)[0]["heldout/nll"]),
    "checkpoint.save_every_steps": (5, lambda folder: list_steps(folder, "host_peak_gib")),
    "rpo.term_gradients_every_steps": (2, lambda folder: list_steps(folder, "grad_norm_dpo")),
}


@pytest.mark.full
def test_whole_runs_show_the_others(workdir):
    def run_rpo(name, **fields):
        steps = {"train__steps": 6, "train__eval_rows": 0}
        run(RPO, rpo_overrides(workdir, name=name, **{**steps, **fields}))
        return workdir / name

    values = {field.replace(".", "__"): value for field, (value, _) in TRACES.items()}
    first, second = run_rpo("fields-first"), run_rpo("fields-second", **values)
    for field, (_, trace) in TRACES.items():
        assert trace(first) != trace(second), field
