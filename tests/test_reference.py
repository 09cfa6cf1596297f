"""Stored log-probabilities of the reference are looked at again before a run trusts them."""

import jax
import numpy as np
import pytest

from rpo_jax.data.records import pair_features, write_records
from rpo_jax.errors import UserError
from rpo_jax.model.qwen2 import Network, init_params
from rpo_jax.training.evaluation import find_references
from rpo_jax.training.state import abstract_weights
from tests.tiny import SHAPE, make_config, make_work, pairs


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "pairs"
    examples = [{"id": str(i), **pair} for i, pair in enumerate(pairs(9))]
    return write_records(folder, pair_features(), examples, lambda: {"fingerprint": "made-up"})


def find(records, folder, step=0, mesh=None, devices=1, dtype="float32"):
    folder.mkdir(exist_ok=True)
    config = make_config(
        model={"compute_dtype": dtype}, mesh=mesh or {}, train={"micro_batches": 2}
    )
    work = make_work(config, Network(SHAPE, compute_dtype=dtype), jax.devices()[:devices])
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(work.network, work.mesh))
    params = jax.device_put(init_params(work.network, jax.random.key(0)), places)

    def first():
        return params

    with jax.set_mesh(work.mesh):
        (found,) = find_references(work, folder, [records], step, params, first)
    return found


def change(records, row, target, by):
    (path,) = records.directory.glob("reference-*.npy")
    stored = np.load(path)
    stored[row, target] += by
    np.save(path, stored)
    return path


@pytest.fixture
def stored(records, tmp_path):
    """The file of a reference that was just computed."""
    for path in records.directory.glob("reference-*.npy"):
        path.unlink()
    return find(records, tmp_path / "run")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_a_sound_reference_passes_on_another_mesh_too(records, tmp_path, dtype, caplog):
    for path in records.directory.glob("reference-*.npy"):
        path.unlink()
    computed = find(records, tmp_path / "one", dtype=dtype)
    assert "computed again" not in caplog.text
    caplog.set_level("INFO")
    for mesh in ({"data": 1, "tensor": 2}, {"data": 1, "seq": 2}):
        found = find(records, tmp_path / "two", mesh=mesh, devices=2, dtype=dtype)
        np.testing.assert_array_equal(found, computed)
    assert caplog.text.count("4 pairs computed again") == 2


def test_a_wrong_number_stops_the_run_and_is_named(records, tmp_path, stored):
    path = change(records, row=8, target=1, by=1e-3)
    with pytest.raises(UserError, match=r"target 1 of record 8 is stored as -\d.*Delete") as error:
        find(records, tmp_path / "other")
    assert str(path) in str(error.value)


def test_a_number_that_is_none_stops_it_too(records, tmp_path, stored):
    change(records, row=0, target=0, by=np.nan)
    with pytest.raises(UserError, match="target 0 of record 0 is stored as nan"):
        find(records, tmp_path / "other")


def test_on_resume_the_digest_decides(records, tmp_path, stored):
    change(records, row=0, target=0, by=1.0)
    found = find(records, tmp_path / "run", step=5)
    np.testing.assert_allclose(found[0, 0], stored[0, 0] + 1.0)
