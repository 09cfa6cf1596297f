"""The folder of a run: what was asked, what was written, what a second start may change."""

import contextlib
import json
import logging
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from rpo_jax import __version__
from rpo_jax.config import Config, to_dict
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError
from rpo_jax.model.shape import ModelShape, load_shape, shape_to_hf

_RUN_FILE = "run.json"

# What a run may go on with: none of these changes its numbers (beyond float rounding).
_FREE = (
    "workdir",
    "log.",
    "checkpoint.",
    "mesh.",
    "model.remat",
    "model.scan_layers",
    "train.micro_batches",
    "train.loss_chunk",
    "train.keep_logits",
    "train.log_every_steps",
    "train.eval_every_steps",
    "train.eval_rows",
    "data.max_dropped_share",
    "rpo.term_gradients_every_steps",
)


def find_shape(config: Config) -> ModelShape:
    """The shape that the config names, or that of the model it starts from.

    Raises:
        UserError: there is none, or the two differ.
    """
    if config.origin is None:
        return load_shape(config.model.shape)
    path = config.origin / "model" / "config.json"
    if not path.is_file():
        raise UserError(
            f"init_from={config.init_from}: {path} is not there; the run before this one, or a "
            "model made by `rpo_jax.convert import`, is wanted"
        )
    shape = load_shape(str(path))
    if config.model.shape and load_shape(config.model.shape) != shape:
        raise UserError(
            f"model.shape={config.model.shape} differs from {path}; leave model.shape empty to "
            "take that one"
        )
    return shape


def check_vocabulary(config: Config, tokenizer: Tokenizer, shape: ModelShape) -> None:
    """Refuses a tokenizer with ids that the embedding, or the vocabulary in use, has no row for.

    Raises:
        UserError: with both numbers.
    """
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding only "
            f"{shape.vocab_size} rows; another tokenizer.path, or a model.shape with a larger "
            "vocab_size"
        )
    if 0 < config.model.used_vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.used_vocab_size={config.model.used_vocab_size} leaves out ids of the "
            f"tokenizer, which go up to {tokenizer.vocab_size - 1}"
        )


def open_run(config: Config, shape: ModelShape, tokenizer: Tokenizer) -> Path:
    """Makes the folder of a run, or checks that the one there is of the same run.

    Writes run.json (the resolved config and the versions), model/config.json and the tokenizer.

    Raises:
        UserError: a run of that name is there and differs in more than a run may change.
    """
    folder = config.folder
    path = folder / _RUN_FILE
    asked = json.loads(json.dumps(to_dict(config)))
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}: damaged ({error}); restore it or choose another name"
            ) from error
        changed = [
            f"{name}: {old!r} -> {new!r}"
            for name, old, new in _differences(before, asked)
            if not name.startswith(_FREE)
        ]
        if changed:
            raise UserError(
                f"{folder} holds a run with another config ({'; '.join(changed)}); choose another "
                "--config.name, or delete the folder to start afresh"
            )
    if jax.process_index() == 0:
        (folder / "model").mkdir(parents=True, exist_ok=True)
        write_json(folder / "model" / "config.json", shape_to_hf(shape))
        tokenizer.save(folder / "model")
        write_json(path, {"config": asked, "versions": _versions()})
    return folder


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "rpo_jax": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
    }


def _differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield prefix + key, before, after


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Also writes log messages to a file while the context is open; process 0 only."""
    if jax.process_index() != 0:
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
