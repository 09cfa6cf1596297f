"""Checkpoints: what was saved comes back, on another mesh too; what is damaged is named."""

import dataclasses
import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rpo_jax.config import Checkpoint
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.errors import UserError
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training import checkpoint
from rpo_jax.training.checkpoint import (
    find_best,
    name_score,
    open_checkpoints,
    restore_state,
    save_state,
)
from rpo_jax.training.optim import make_optimizer
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import (
    abstract_state,
    abstract_weights,
    fingerprint_params,
    make_params,
    start_from,
)
from rpo_jax.weights.names import list_tensors
from rpo_jax.weights.store import open_arrays
from tests.tiny import NETWORK, make_config

TX = make_optimizer(make_config().optim)
ONE = make_mesh(MeshConfig(), jax.devices()[:1])
EIGHT = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 0 and 3, and the state of step 3."""
    folder = tmp_path_factory.mktemp("saved")
    state = start_from(make_params(NETWORK, ONE, seed=0), TX, abstract_state(NETWORK, TX, ONE))
    later = dataclasses.replace(state, step=state.step + 3)
    with open_checkpoints(folder, Checkpoint(keep=2)) as checkpoints:
        save_state(checkpoints, state)
        save_state(checkpoints, later)
        save_state(checkpoints, later)  # a second time: it is there already
    return folder, later


def test_a_state_comes_back_on_any_mesh(saved):
    folder, state = saved
    for mesh in (ONE, EIGHT):
        with open_checkpoints(folder, Checkpoint(keep=2)) as checkpoints:
            found = restore_state(checkpoints, abstract_state(NETWORK, TX, mesh))
        assert int(found.step) == 3
        jax.tree.map(np.testing.assert_array_equal, state, found)
        kernel = found.params["layers"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.mesh == mesh
        assert fingerprint_params(found.params) == fingerprint_params(state.params)


def test_the_best_is_kept_beside_the_newest(tmp_path):
    config = Checkpoint(keep=1, best="answer_only")
    state = start_from(make_params(NETWORK, ONE, seed=0), TX, abstract_state(NETWORK, TX, ONE))
    shares = {1: 0.2, 2: 0.6, 3: None, 4: 0.6, 5: 0.1, 6: None}
    kept = {}
    for step, share in shares.items():
        with open_checkpoints(tmp_path, config) as checkpoints:  # each as if the run went on
            name = name_score("answer_only")
            scores = {} if share is None else {name: share}
            later = dataclasses.replace(state, step=state.step + step)
            save_state(checkpoints, later, scores=scores)
        with open_checkpoints(tmp_path, config) as checkpoints:
            steps = {found.step for found in checkpoints.checkpoints}
            kept[step] = steps, find_best(checkpoints, config)
            assert find_best(checkpoints, Checkpoint(best="explain_first")) is None
    assert kept == {
        1: ({1}, (1, 0.2)),
        2: ({2}, (2, 0.6)),
        3: ({2, 3}, (2, 0.6)),
        4: ({4}, (4, 0.6)),  # of equals the newest
        5: ({4, 5}, (4, 0.6)),
        6: ({4, 6}, (4, 0.6)),
    }


def test_the_fingerprint_sees_a_changed_and_a_moved_value(saved):
    _, state = saved
    table = state.params["embed"]["table"]
    for other in (table.at[0, 0].add(1e-6), table[::-1]):
        changed = {**state.params, "embed": {"table": other}}
        assert fingerprint_params(changed) != fingerprint_params(state.params)


def test_what_is_saved_is_read_in_small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 2000)
    state = start_from(make_params(NETWORK, ONE, seed=0), TX, abstract_state(NETWORK, TX, ONE))
    assert max(leaf.nbytes for leaf in jax.tree.leaves(state.params)) > 2000
    with open_checkpoints(tmp_path, Checkpoint()) as checkpoints:
        save_state(checkpoints, state)
    shape = NETWORK.shape
    step = epath.Path(tmp_path / "checkpoints" / "0")
    arrays = open_arrays(step, list_tensors(shape), shape.num_hidden_layers)
    assert 500 < arrays.largest_chunk() <= 2000
    stacked = [array for path, array in arrays.by_path.items() if path.startswith("layers/")]
    assert {array.chunk_layout.read_chunk.shape[0] for array in stacked} == {1}
    _, params = load_params(tmp_path, abstract_weights(NETWORK, EIGHT))
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_no_checkpoint_is_no_state(tmp_path):
    with open_checkpoints(tmp_path, Checkpoint()) as checkpoints:
        assert restore_state(checkpoints, abstract_state(NETWORK, TX, ONE)) is None
    with pytest.raises(UserError, match="no checkpoint there"):
        load_params(tmp_path, abstract_weights(NETWORK, ONE))


def test_weights_are_loaded_by_step_and_cast(saved):
    folder, state = saved
    half = dataclasses.replace(NETWORK, param_dtype="bfloat16")
    step, params = load_params(folder, abstract_weights(half, EIGHT), step=0)
    assert step == 0
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), state.params, params
    )
    with pytest.raises(UserError, match="no checkpoint of step 7; there are"):
        load_params(folder, abstract_weights(NETWORK, ONE), step=7)


def test_another_shape_is_refused_by_name(saved):
    folder, _ = saved
    wide = dataclasses.replace(NETWORK.shape, intermediate_size=64)
    other = dataclasses.replace(NETWORK, shape=wide)
    with pytest.raises(UserError, match=r"layers/mlp/down/kernel is \(3, 48, 32\) there and"):
        load_params(folder, abstract_weights(other, ONE))
    half = dataclasses.replace(NETWORK, param_dtype="bfloat16")
    with (
        open_checkpoints(folder, Checkpoint(keep=2)) as checkpoints,
        pytest.raises(UserError, match=r"is float32 .* there and bfloat16"),
    ):
        restore_state(checkpoints, abstract_state(half, TX, ONE))


def test_a_damaged_checkpoint_is_named(saved, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(saved[0], folder)
    largest = max((folder / "checkpoints/3/params").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="checkpoints/3: cannot be read and may be damaged"):
        load_params(folder, abstract_weights(NETWORK, ONE))


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code):
        super().__init__(f"HTTP {code}")
        self.code = code


HttpError.__module__ = "gcsfs.retry"
MISSING = FileNotFoundError(errno.ENOENT, "No such file or directory", "d/0")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.EIO, "Input/output error"), 75),
        (TimeoutError("timed out"), 75),
        (HttpError(503), 75),
        (HttpError(403), 2),
        (ValueError("UNAVAILABLE: Error reading gs://b/o: HTTP response code: 503"), 75),
        (ValueError("DATA_LOSS: Error reading chunk"), 2),
        (MISSING, 2),
    ],
    ids=repr,
)
def test_storage_that_is_away_is_no_damage(saved, monkeypatch, error, status):
    def fail(*_, **__):
        raise ValueError("a task failed") from error

    with open_checkpoints(saved[0], Checkpoint(keep=2)) as checkpoints:
        monkeypatch.setattr(checkpoints, "load_checkpointables", fail)
        with pytest.raises(UserError, match="checkpoints/3: cannot be read") as told:
            restore_state(checkpoints, abstract_state(NETWORK, TX, ONE))
    assert told.value.status == status
    assert ("may be damaged" in str(told.value)) == (status == 2)
