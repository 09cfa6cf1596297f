"""Put a world on disk: text, pairs and exam files, whole or not at all."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpo_jax.errors import UserError
from rpo_jax.exams.fictional.passages import Document
from rpo_jax.exams.fictional.world import SPLIT_YEARS, VERSION, Pair, World, is_test_world
from rpo_jax.exams.igakuqa import write_questions
from rpo_jax.writing import draft_folder

WORLD_FILE = "world.json"


def write_world(directory: str | Path, world: World) -> Path:
    """Writes a world, or finds that the same one is already there.

    Files: ``general.jsonl``, ``textbook.jsonl``, ``textbook_heldout.jsonl`` and one for each sort
    of `GAMES`, such as ``copies.jsonl`` (id, text),
    ``pairs_train.jsonl``, ``pairs_heldout.jsonl`` (id, prompt, chosen, rejected), ``exam/`` in
    the IgakuQA layout (a year a split, see `SPLIT_YEARS`) and ``world.json``.

    Returns:
        The directory.

    Raises:
        UserError: Something else is in the directory.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        _check_same(target, world)
        return target
    with draft_folder(target) as draft:
        _write_files(draft, world)
    _check_same(target, world)  # another process may have been faster
    return target


def _write_files(root: Path, world: World) -> None:
    for name, texts in world.games.items():
        _write_lines(root / f"{name}.jsonl", texts)
    _write_lines(root / "general.jsonl", world.general)
    _write_lines(root / "textbook.jsonl", world.textbook)
    _write_lines(root / "textbook_heldout.jsonl", world.textbook_heldout)
    for split, pairs in world.pairs.items():
        _write_lines(root / f"pairs_{split}.jsonl", pairs)
    questions = [item.question for items in world.exam.values() for item in items]
    write_questions(root / "exam", questions, world.demonstrations)
    description = {
        **_identity(world),
        "fictional": "架空。Every name and fact here is invented; none of it is medicine.",
        "test_world": is_test_world(world.seed),
        "years": SPLIT_YEARS,
        "documents": {
            **{name: len(texts) for name, texts in world.games.items()},
            "general": len(world.general),
            "textbook": len(world.textbook),
            "textbook_heldout": len(world.textbook_heldout),
        },
        "pairs": {split: len(pairs) for split, pairs in world.pairs.items()},
        "questions": {split: len(items) for split, items in world.exam.items()},
    }
    text = json.dumps(description, ensure_ascii=False, indent=2)
    (root / WORLD_FILE).write_text(text + "\n", encoding="utf-8")


def _identity(world: World) -> dict[str, Any]:
    return {
        "generator_version": VERSION,
        "seed": world.seed,
        "size": dataclasses.asdict(world.size),
    }


def _check_same(directory: Path, world: World) -> None:
    try:
        stored = json.loads((directory / WORLD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} is not empty and not a fictional world ({error}); "
            "choose another directory or remove it"
        ) from error
    wanted = _identity(world)
    different = [key for key in wanted if stored.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise UserError(
            f"{directory} holds a world with {key} {stored.get(key)}, asked for {wanted[key]}; "
            "choose another directory or remove it"
        )


def _write_lines(path: Path, records: Sequence[Document | Pair]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
