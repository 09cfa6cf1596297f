"""Checkpoints by Orbax, and the folder that holds a model.

A *model folder* is a run's folder or what `convert import` writes:

    model/config.json                the shape, as Hugging Face writes it
    model/tokenizer.json|.model      the tokenizer
    checkpoints/<step>/params        the weights
    checkpoints/<step>/optimizer     step and optimizer state (runs only)

Orbax writes each step into a temporary folder and renames it, so that a killed process leaves only
whole checkpoints.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from rpo_jax.config import Checkpoint as CheckpointConfig
from rpo_jax.errors import UserError
from rpo_jax.model.qwen2 import Params
from rpo_jax.training.state import TrainState

_FOLDER = "checkpoints"


def open_checkpoints(folder: Path, config: CheckpointConfig) -> ocp.training.Checkpointer:
    """The checkpoints of a run, the newest `config.keep` of them; closing waits for saves."""
    return ocp.training.Checkpointer(
        (folder / _FOLDER).absolute(),
        preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
        cleanup_tmp_directories=True,
    )


def save_state(checkpoints: ocp.training.Checkpointer, state: TrainState) -> None:
    """Writes a state in the background, once the save before has ended; an existing step stays."""
    checkpoints.wait()
    step = int(state.step)
    if any(found.step == step for found in checkpoints.checkpoints):
        return
    optimizer = {"step": state.step, "state": state.optimizer}
    checkpoints.save_checkpointables_async(
        step, {"params": state.params, "optimizer": optimizer}, force=True
    )


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
    loaded = _load(checkpoints, step, wanted)
    return TrainState(loaded["optimizer"]["step"], loaded["params"], loaded["optimizer"]["state"])


def load_params(folder: Path, abstract: Params, step: int | None = None) -> tuple[int, Params]:
    """Step and weights of a model folder, placed and cast as `abstract` says; default: newest.

    Raises:
        UserError: the folder holds no checkpoint (of that step), or one of another shape.
    """
    with open_existing(folder) as checkpoints:
        steps = [found.step for found in checkpoints.checkpoints]
        if step is not None and step not in steps:
            raise UserError(f"{folder}: no checkpoint of step {step}; there are {steps}")
        chosen = steps[-1] if step is None else step
        return chosen, _load(checkpoints, chosen, {"params": abstract}, cast=True)["params"]


def has_checkpoint(folder: Path) -> bool:
    """Whether a model folder holds a finished checkpoint, judged by its folders' names."""
    path = folder / _FOLDER
    return path.is_dir() and any(step.name.isdigit() for step in path.iterdir())


def open_existing(folder: Path) -> ocp.training.Checkpointer:
    """The checkpoints of a model folder, for reading.

    Raises:
        UserError: there are none.
    """
    path = (folder / _FOLDER).absolute()
    if path.is_dir():
        checkpoints = ocp.training.Checkpointer(path)
        if checkpoints.latest is not None:
            return checkpoints
        checkpoints.close()
    raise UserError(
        f"{folder}: no checkpoint there; init_from wants the folder of a finished run or of "
        "`rpo_jax.convert import`"
    )


def _load(
    checkpoints: ocp.training.Checkpointer, step: int, wanted: dict[str, Any], cast: bool = False
) -> Any:
    place = f"{checkpoints.directory}/{step}"
    try:
        stored = checkpoints.checkpointables_metadata(step).metadata
        for name, tree in wanted.items():
            if name not in stored or stored[name] is None:
                raise ValueError(f"no {name}")
            _check_same_arrays(f"{place}/{name}", tree, stored[name], cast)
        return checkpoints.load_checkpointables(step, wanted)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place}: cannot be read and may be damaged ({type(error).__name__}: {error}); "
            "without that folder, the checkpoint before it is used, where there is one"
        ) from error


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
