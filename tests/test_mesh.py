"""The mesh: which numbers of devices it can be laid over, and what is said of others."""

import re

import pytest

from rpo_jax.config import Mesh
from rpo_jax.errors import UserError
from rpo_jax.sharding.mesh import is_enough, mesh_sizes, say_wanted


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
