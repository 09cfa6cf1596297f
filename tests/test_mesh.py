"""The mesh: which devices it can be laid over, what it divides, and what is said of the rest."""

import re
from dataclasses import replace

import jax
import pytest

from rpo_jax.config import Mesh
from rpo_jax.errors import UserError
from rpo_jax.sharding.mesh import is_enough, mesh_sizes, say_wanted
from tests.tiny import make_config, make_work


def test_what_is_left_goes_to_the_free_axis():
    sizes = mesh_sizes(Mesh(data=1, fsdp=-1, tensor=4), 256)
    assert sizes == {"data": 1, "fsdp": 64, "seq": 1, "tensor": 4}
    assert say_wanted(Mesh(data=-1, fsdp=1)) == "1 device"


@pytest.mark.parametrize(
    ("mesh", "count", "told"),
    [
        (
            Mesh(data=1, fsdp=16, tensor=4),
            256,
            "mesh (data=1, fsdp=16, seq=1, tensor=4) wants 64 devices, 256 are there: take the "
            "config's argument for them (configs/NAME.py:SLICE), or mesh.fsdp=-1",
        ),
        (
            Mesh(data=-1, fsdp=16, tensor=4),
            100,
            "mesh (data=-1, fsdp=16, seq=1, tensor=4) wants a multiple of 64 devices, 100 are "
            "there: the numbers have to divide them",
        ),
    ],
    ids=["exactly", "a multiple"],
)
def test_what_is_wanted_is_said(mesh, count, told):
    assert not is_enough(mesh, count)
    with pytest.raises(UserError, match="^" + re.escape(told)):
        mesh_sizes(mesh, count)


@pytest.mark.parametrize("attention", ["dense", "blocks"])
@pytest.mark.parametrize(
    ("stage", "lengths", "told"),
    [
        ("cpt", {"row_length": 25}, "rows of 25 tokens over mesh.seq=2; .* change data.row_length"),
        (
            "rpo",
            {"prompt_length": 13},
            "rows of 25 tokens over mesh.seq=2; .* change data.prompt_length, data.response_length",
        ),
        ("rpo", {"row_sizes": 5}, "rows of 5 tokens over mesh.seq=2; a multiple of 2 is wanted"),
    ],
)
def test_rows_that_the_mesh_does_not_divide_are_refused(attention, stage, lengths, told):
    mesh = {"data": 1, "seq": 2}
    whole = make_config(stage, model={"attention": attention}, mesh=mesh)
    make_work(whole, devices=jax.devices()[:2])
    with pytest.raises(UserError, match=told):
        make_work(replace(whole, data=replace(whole.data, **lengths)), devices=jax.devices()[:2])
