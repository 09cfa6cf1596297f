"""Exams for tests: sittings whose answers follow from a rule, and a model of random weights."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import optax

from rpo_jax.config import Checkpoint as CheckpointConfig
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.tokenizer import train_sentencepiece
from rpo_jax.exams.asking import (
    ANSWER_ONLY,
    MODES,
    Drawing,
    Sitting,
    digest_questions,
    open_sitting,
)
from rpo_jax.exams.fictional import SIZES, make_world, write_world
from rpo_jax.exams.igakuqa import Question, read_demonstrations, read_questions
from rpo_jax.exams.responses import Response, to_record
from rpo_jax.model.qwen2 import Network
from rpo_jax.model.shape import load_shape
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.checkpoint import open_checkpoints, save_state
from rpo_jax.training.state import abstract_state, make_params, start_from

YEAR = 3003
SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 704,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}


def make_model(folder: Path) -> Path:
    """A model folder with random weights and a tokenizer of the tiny world's text."""
    world = make_world(0, SIZES["tiny"])
    texts = [document.text for document in (*world.general, *world.textbook)]
    (folder / "model").mkdir(parents=True)
    train_sentencepiece(texts, 700, folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(SHAPE))
    network = Network(load_shape(str(folder / "model" / "config.json")))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with (
        jax.set_mesh(mesh),
        open_checkpoints(folder, CheckpointConfig()) as checkpoints,
    ):
        tx = optax.sgd(0.1)
        params = make_params(network, mesh, seed=0)
        save_state(checkpoints, start_from(params, tx, abstract_state(network, tx, mesh)))
    return folder


def make_exam(folder: Path) -> tuple[Path, list[Question]]:
    """The exam of the tiny fictional world: its folder and its test questions."""
    directory = write_world(folder / "world", make_world(0, SIZES["tiny"])) / "exam"
    return directory, read_questions(directory, [YEAR])


def plan_sitting(directory: Path, questions: list[Question], name: str = "model") -> Sitting:
    """What `take_exam` would write for these questions."""
    demonstrations = read_demonstrations(directory)
    return Sitting(
        exam="fictional",
        exam_dir=str(directory),
        years=(YEAR,),
        questions=digest_questions(questions, demonstrations),
        asked=len(questions),
        model=f"/models/{name}",
        step=7,
        weights="0123456789abcdef",
        shots=0,
        drawing=Drawing(),
    )


def gold(question: Question) -> str:
    """The right answer as a text."""
    return ",".join(question.accepted[0])


def wrong(question: Question) -> str:
    """A wrong answer as a text."""
    if question.is_numeric:
        return "99999"
    return "a" if question.accepted[0] != ("a",) else "b"


def sit(
    folder: Path,
    directory: Path,
    questions: list[Question],
    is_right: Callable[[str, int, int], bool],
    seeds: tuple[int, ...] = (0,),
    name: str = "model",
) -> Path:
    """Writes a finished sitting; `is_right(mode, seed, place)` says how each question went."""
    open_sitting(folder, plan_sitting(directory, questions, name))
    for mode in MODES:
        for seed in seeds:
            lines = []
            for place, question in enumerate(questions):
                said = (gold if is_right(mode, seed, place) else wrong)(question)
                text = f"\n{said}" if mode == ANSWER_ONLY else f"考える。\n答え: {said}"
                response = Response(question.id, text, said, "eos", len(text))
                lines.append(json.dumps(to_record(response), ensure_ascii=False) + "\n")
            path = folder / "responses" / f"{mode}-{seed}.jsonl"
            path.write_text("".join(lines), encoding="utf-8")
    return folder
