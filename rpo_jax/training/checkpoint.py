"""Checkpoints by Orbax, and the folder that holds a model.

A *model folder* is a run's folder or what `convert import` writes:

    model/config.json                the shape, as Hugging Face writes it
    model/tokenizer.json|.model      the tokenizer
    model/adapters.json              whose weights the adapters change (runs of adapters only)
    checkpoints/<step>/params        the weights; of a run of adapters, these alone
    checkpoints/<step>/optimizer     step and optimizer state (runs only)

Orbax writes each step into a temporary folder and renames it, so that a killed process leaves only
whole checkpoints.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from rpo_jax.config import Checkpoint as CheckpointConfig
from rpo_jax.errors import PassingError, UserError, may_pass
from rpo_jax.model.qwen2 import Params
from rpo_jax.training.state import TrainState
from rpo_jax.weights.store import find_checkpoints, place_checkpoints
from rpo_jax.weights.workplace import refuse_unfinished

# A host of another mesh, or an export, reads whole chunks for the part of an array that it wants.
# A chunk is of one layer: an export goes layer by layer, and would else read all for each of them.
_CHUNK_BYTES = 32 * 2**20

# How clients of buckets tell that a server is away: by the library, and by the status in the text.
_CLIENTS = {"aiohttp", "gcsfs", "google", "requests", "urllib3"}
_AWAY = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b")
_REFUSED = (400, 401, 403, 404, 412)  # of HTTP: asked again, they are the same

Read = Callable[[Any, jax.ShapeDtypeStruct], jax.Array]


def open_checkpoints(folder: Path, config: CheckpointConfig) -> ocp.training.Checkpointer:
    """The checkpoints of a run; closing waits for saves.

    The newest `config.keep` are kept, and the best one where the config says by what.
    """
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.array.saving.scoped_storage_options_creator = _cut_layers
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(config.keep)]
    if config.best:
        get_score = partial(_get_score, name_score(config.best))
        best = policies.BestN(get_metric_fn=get_score, n=1, keep_checkpoints_without_metrics=False)
        kept.append(best)
    return ocp.training.Checkpointer(
        place_checkpoints(epath.Path(folder).resolve(), config.directory),
        context=context,
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
    )


def _cut_layers(path: Any, leaf: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Cuts what is stacked over layers, weights and optimizer moments alike, along that axis."""
    keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if "layers" not in keys or not leaf.ndim:
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))


def name_score(mode: str) -> str:
    """The name of the dev exam's score in a way of asking: points of those possible."""
    return f"exam/{mode}/share"


def _get_score(name: str, scores: Mapping[str, float]) -> float:
    return scores.get(name, -math.inf)


def find_best(
    checkpoints: ocp.training.Checkpointer, config: CheckpointConfig
) -> tuple[int, float] | None:
    """Step and score of the best checkpoint, of equals the newest; None where none was scored."""
    name = name_score(config.best)
    scored = [
        (found.metrics[name], found.step)
        for found in checkpoints.checkpoints
        if found.metrics and name in found.metrics
    ]
    if not scored:
        return None
    score, step = max(scored)
    return step, score


def save_state(
    checkpoints: ocp.training.Checkpointer,
    state: TrainState,
    fingerprints: Mapping[str, str] | None = None,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Writes a state in the background, once the save before has ended; an existing step stays.

    Args:
        checkpoints: of the run.
        state: to be saved.
        fingerprints: of what it was trained on; kept with it as its custom metadata.
        scores: by name, where the checkpoint may be the best; higher is better.
    """
    checkpoints.wait()
    step = int(state.step)
    if any(found.step == step for found in checkpoints.checkpoints):
        return
    optimizer = {"step": state.step, "state": state.optimizer}
    checkpoints.save_checkpointables_async(
        step,
        {"params": state.params, "optimizer": optimizer},
        force=True,
        custom_metadata={"fingerprints": dict(fingerprints or {})},
        metrics=dict(scores) if scores else None,
    )


def find_fingerprints(checkpoints: ocp.training.Checkpointer) -> dict[str, str]:
    """What the newest state was saved with; nothing where there is none yet."""
    if checkpoints.latest is None:
        return {}
    step = checkpoints.latest.step
    found = _read(checkpoints, step, lambda: checkpoints.checkpointables_metadata(step))
    return dict(found.custom_metadata["fingerprints"])


def restore_state(
    checkpoints: ocp.training.Checkpointer, abstract: TrainState
) -> TrainState | None:
    """The newest state, laid out as `abstract` says; None where there is none yet.

    Raises:
        UserError: a checkpoint is there and cannot be read, or is of another shape.
    """
    if checkpoints.latest is None:
        return None
    step = checkpoints.latest.step
    wanted = {
        "params": abstract.params,
        "optimizer": {"step": abstract.step, "state": abstract.optimizer},
    }
    metadata = partial(checkpoints.checkpointables_metadata, step)
    stored = _read(checkpoints, step, lambda: {name: metadata().metadata[name] for name in wanted})
    for name, tree in wanted.items():
        place = f"{checkpoints.directory}/{step}/{name}"
        _check_same_arrays(place, tree, stored[name], cast=False)
    loaded = _read(checkpoints, step, partial(checkpoints.load_checkpointables, step, wanted))
    return TrainState(loaded["optimizer"]["step"], loaded["params"], loaded["optimizer"]["state"])


def find_step(checkpoints: ocp.training.Checkpointer, step: int | None) -> int:
    """The step to read: the one asked for, or the newest.

    Raises:
        UserError: it is not there.
    """
    steps = [found.step for found in checkpoints.checkpoints]
    if step is not None and step not in steps:
        raise UserError(f"{checkpoints.directory}: no checkpoint of step {step}; there are {steps}")
    return steps[-1] if step is None else step


def describe_params(checkpoints: ocp.training.Checkpointer, step: int) -> Params:
    """Shapes and dtypes of the weights that a checkpoint holds.

    Raises:
        UserError: it cannot be read.
    """
    stored = _read(
        checkpoints, step, lambda: checkpoints.checkpointables_metadata(step).metadata["params"]
    )
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        stored,
        is_leaf=lambda node: hasattr(node, "shape"),
    )


def open_params(checkpoints: ocp.training.Checkpointer, step: int, wanted: Params) -> Read:
    """A function that reads one array of a checkpoint's weights, placed and cast as asked.

    Args:
        checkpoints: from `open_existing`.
        step: which of them.
        wanted: abstract arrays, all that there should be; the function takes a path in this tree
            and an array's shape, dtype and place.

    Raises:
        UserError: the checkpoint holds other arrays, or cannot be read.
    """
    place = f"{checkpoints.directory}/{step}/params"
    _check_same_arrays(place, wanted, describe_params(checkpoints, step), cast=True)

    def read(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tree: Any = leaf
        for key in reversed(path):
            tree = {key.key: tree}
        load = partial(checkpoints.load_checkpointables, step, {"params": tree})
        (array,) = jax.tree.leaves(_read(checkpoints, step, load)["params"])
        return array

    return read


def has_checkpoint(folder: Path) -> bool:
    """Whether a model folder holds a finished checkpoint, judged by its folders' names."""
    return has_steps(find_checkpoints(epath.Path(folder)))


def has_steps(place: epath.Path) -> bool:
    """Whether a folder holds finished checkpoints, judged by its folders' names."""
    return place.is_dir() and any(step.name.isdigit() for step in place.iterdir())


def open_existing(folder: Path) -> ocp.training.Checkpointer:
    """The checkpoints of a model folder, for reading.

    Raises:
        UserError: there are none, or an import into the folder is not finished.
    """
    refuse_unfinished(epath.Path(folder))
    path = find_checkpoints(epath.Path(folder).resolve())
    if path.is_dir():
        # Of a checkpoint with the optimizer's state too, the weights are read, one array at a time.
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            checkpoints = ocp.training.Checkpointer(path)
        if checkpoints.latest is not None:
            return checkpoints
        checkpoints.close()
    raise UserError(
        f"{folder}: no checkpoint there; a run that has saved one, or a folder made by "
        "`rpo_jax.convert import`, is wanted"
    )


def _read(checkpoints: ocp.training.Checkpointer, step: int, read: Callable[[], Any]) -> Any:
    """What `read` returns; whatever goes wrong in Orbax is told as a UserError.

    As a PassingError if the storage is away.
    """
    try:
        return read()
    except Exception as error:
        if _is_away(error):
            raise PassingError(
                f"{checkpoints.directory}/{step}: cannot be read ({type(error).__name__}: {error}) "
                "since the storage does not answer; the same command tries again"
            ) from error
        raise UserError(
            f"{checkpoints.directory}/{step}: cannot be read and may be damaged "
            f"({type(error).__name__}: {error}); "
            "without that folder, the checkpoint before it is used, where there is one"
        ) from error


def _is_away(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, tells of storage that does not answer."""
    while error is not None:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            return False
        if isinstance(error, OSError) and may_pass(error):
            return True
        client = type(error).__module__.partition(".")[0] in _CLIENTS
        if client and getattr(error, "code", getattr(error, "status", None)) not in _REFUSED:
            return True
        if _AWAY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_same_arrays(place: str, wanted: Any, stored: Any, cast: bool) -> None:
    def arrays(tree: Any) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                f"{tuple(x.shape)}" if cast else f"{x.dtype} {tuple(x.shape)}"
            )
            for path, x in leaves
        }

    want, have = arrays(wanted), arrays(stored)
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise UserError(
                f"{place}: {name} is {have.get(name, 'absent')} there and "
                f"{want.get(name, 'absent')} in this run: another model.shape, dtype or optimizer?"
            )
