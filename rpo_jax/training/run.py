"""The folder of a run: what was asked, what was written, what a second start may change."""

import contextlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from etils import epath

import rpo_jax
from rpo_jax.config import Config, to_dict
from rpo_jax.data.records import digest
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError
from rpo_jax.model.shape import ModelShape, load_shape, shape_to_hf
from rpo_jax.training.checkpoint import has_checkpoint, has_steps
from rpo_jax.training.origin import NOTE, note_adapters
from rpo_jax.weights.store import RUN_FILE, place_checkpoints
from rpo_jax.writing import hold, write_json

# What a run may go on with: none of these changes its numbers (beyond float rounding).
_FREE = (
    "workdir",
    "log.",
    "checkpoint.save_every_steps",
    "checkpoint.keep",
    "checkpoint.best",
    "exam",
    "mesh.",
    "model.attention",
    "model.remat",
    "model.offload",
    "model.scan_layers",
    "train.micro_batches",
    "train.loss_chunk",
    "train.keep_logits",
    "train.log_every_steps",
    "train.eval_every_steps",
    "data.max_dropped_share",
    "data.corpus.max_filtered_share",
    "data.workers",
    "data.sample.slots",
    "data.pair.max_left_out_share",
    "rounds.",
    "study.",
    "data.pairs_per_row",
    "data.row_sizes",
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
            f"init_from={config.init_from}: {path} is not there; the run before this one "
            "(train its config first), or a model made by `rpo_jax.convert import`, is "
            f"wanted{config.origin_hint}"
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


def check_folder(config: Config) -> None:
    """Refuses to start a run where the folder, or the place of its checkpoints, has another one.

    Raises:
        UserError: names what differs.
    """
    if has_checkpoint(config.folder):
        check_same_run(config)
        return
    place = place_checkpoints(epath.Path(config.folder), config.checkpoint.directory)
    if has_steps(place):
        raise UserError(
            f"checkpoint.directory={config.checkpoint.directory}: {place} holds checkpoints, but "
            f"{config.folder} is not the run that they are of; restore that, or choose another "
            "--config.name"
        )


def open_run(config: Config, shape: ModelShape, tokenizer: Tokenizer, data: dict[str, str]) -> Path:
    """Makes the folder of a run, or checks that the run which is there was made of the same data.

    Writes run.json (the resolved config, the fingerprints of the data and the versions) and model/:
    that of the model the run starts from, unchanged, or a new config.json and the tokenizer. A run
    that has a checkpoint keeps all of these; one that has none yet may be started otherwise.

    Args:
        config: of the run.
        shape: of its network.
        tokenizer: of its records.
        data: fingerprints of what it reads, by name.

    Raises:
        UserError: they changed.
    """
    folder = config.folder
    if has_checkpoint(folder):
        before = _read_run(folder)["data"]
        changed = [name for name in data if data[name] != before.get(name)]
        if changed:
            raise UserError(
                f"{folder}: {' and '.join(changed)} changed since this run began; restore what it "
                "was made of, or choose another --config.name"
            )
        return folder
    if jax.process_index() == 0:
        (folder / "model").mkdir(parents=True, exist_ok=True)
        if config.origin is None:
            write_json(folder / "model" / "config.json", shape_to_hf(shape))
        else:
            # What whole weights, or adapters, this run has is its own affair.
            ours = shutil.ignore_patterns(NOTE)
            (folder / "model" / NOTE).unlink(missing_ok=True)
            shutil.copytree(
                config.origin / "model", folder / "model", ignore=ours, dirs_exist_ok=True
            )
        if config.lora.rank:
            note_adapters(config, tokenizer)
        if config.origin is None or config.tokenizer.path:
            tokenizer.save(folder / "model")
        versions = find_versions() | {"device": jax.devices()[0].device_kind}
        made = {"commit": find_commit(), "versions": versions}
        run = {"config": to_dict(config), "data": data, **made}
        write_json(folder / RUN_FILE, run)
    return folder


def check_same_run(config: Config, free: tuple[str, ...] = _FREE) -> None:
    """Refuses a config that is not the one its run was made with.

    Args:
        config: names the run.
        free: dotted names, or beginnings of them, that may differ.

    Raises:
        UserError: names what differs; or the run's run.json is damaged or missing.
    """
    asked = json.loads(json.dumps(to_dict(config)))
    changed = [
        f"{name}: {old!r} -> {new!r}"
        for name, old, new in list_changes(_read_run(config.folder)["config"], asked)
        if not name.startswith(free)
    ]
    if changed:
        raise UserError(
            f"{config.folder} holds a run with another config ({'; '.join(changed)}); give the "
            "values before the arrows for that run, or choose another --config.name"
        )


def digest_settings(config: Config, also_free: tuple[str, ...] = ()) -> str:
    """Tells configs apart by what the numbers of a run come from.

    Args:
        config: of a run.
        also_free: dotted names that are not looked at, beside those that may change on the way.
    """
    free = (*_FREE, *also_free)
    return digest([item for item in list_values(to_dict(config)) if not item[0].startswith(free)])


def read_fingerprints(folder: Path) -> dict[str, str]:
    """The fingerprints of data and tokenizer that a run was made of; none of another model."""
    return _read_run(folder)["data"] if (folder / RUN_FILE).exists() else {}


def _read_run(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return {"config": dict(run["config"]), "data": dict(run["data"])}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {folder} is not a run of this program") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); restore it or choose another name") from error


def describe_command(verb: str) -> dict[str, Any]:
    """The command that writes results, with date, machine, commit and versions.

    What the results are of may have been made earlier: runs have their own, in `run.json`.
    """
    return {
        "command": shlex.join(["python", "-m", f"rpo_jax.{verb}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": find_commit(),
        "versions": find_versions(),
    }


def find_versions() -> dict[str, str]:
    """Versions of what a run is computed with; of extras, `absent` where they are not installed."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "rpo_jax": rpo_jax.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        **{name: _find_version(name) for name in ("libtpu", "qwix", "gcsfs")},
    }


def find_commit() -> str:
    """The commit of the clone that this code lies in; `absent`, where it lies in none.

    Ends in `-dirty` if a file of that commit was changed.
    """
    clone = Path(rpo_jax.__file__).parents[1]
    if not (clone / ".git").exists():  # what lies around an installed package is another clone
        return "absent"
    git = ["git", "--no-optional-locks", "-C", str(clone), "describe"]
    try:
        found = subprocess.run(
            [*git, "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "absent"
    return found.stdout.strip()


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def list_values(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of nested dicts."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from list_values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def list_changes(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two nested dicts: dotted name, old value, new value."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from list_changes(before, after, f"{prefix}{key}.")
        elif before != after:
            yield prefix + key, before, after


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def hold_run(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps a second process from training the run of a folder; on process 0.

    Raises:
        UserError: as the context opens, if another one does.
    """
    return hold(folder / RUN_FILE) if jax.process_index() == 0 else contextlib.nullcontext()


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
