"""The device mesh."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.errors import UserError


def mesh_sizes(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Devices on each axis, with -1 filled in.

    Raises:
        UserError: the axes do not multiply to `device_count`.
    """
    sizes = dataclasses.asdict(config)
    named, free = _count_named(config)
    if not is_enough(config, device_count):
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        mend = (
            "the numbers have to divide them"
            if free
            else "take the config's argument for them (configs/NAME.py:SLICE), or mesh.fsdp=-1, "
            "which is all that the other axes leave"
        )
        raise UserError(
            f"mesh ({asked}) wants {say_wanted(config)}, {device_count} are there: {mend}"
        )
    return {axis: device_count // named if axis == free else size for axis, size in sizes.items()}


def is_enough(config: MeshConfig, device_count: int) -> bool:
    """Whether a mesh can be laid over so many devices."""
    named, free = _count_named(config)
    return device_count % named == 0 if free else device_count == named


def say_wanted(config: MeshConfig) -> str:
    """How many devices a mesh can be laid over, in words."""
    named, free = _count_named(config)
    return f"{'a multiple of ' if free and named > 1 else ''}{named} device{'s' * (named > 1)}"


def _count_named(config: MeshConfig) -> tuple[int, str]:
    """Devices on the axes that have a number, and the axis that takes the rest; "": none does."""
    sizes = dataclasses.asdict(config)
    free = next((axis for axis, size in sizes.items() if size == -1), "")
    return math.prod(size for size in sizes.values() if size != -1), free


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with axes data, fsdp, seq and tensor; by default over all devices of all processes.

    Several slices lie one after the other along `data`, the axis that talks least.

    Raises:
        UserError: the axes do not multiply to the devices, or `data` not to the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data={sizes['data']}: {slices} slices are joined along data, a multiple of "
            f"{slices} is wanted"
        )
    within = {**sizes, "data": sizes["data"] // slices}
    # A mesh axis of 4 may be a quarter of a side of 16 chips.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(
            tuple(within.values()), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(within.values()), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


# Asked of the TPU compiler: what a layer gathers travels while something is computed, also within
# the fusion that computes it. By itself it has most gathers wait.
_TPU_OPTIONS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


def is_one_cpu(mesh: jax.sharding.Mesh) -> bool:
    """Whether all is computed by one CPU device."""
    return bool(mesh.size == 1 and mesh.devices.flat[0].platform == "cpu")


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """What the compiler of the mesh's devices is asked for, beyond its defaults.

    Of TPUs v5e alone: libtpu 0.0.50 refuses gathers that run through fusions on any other.
    """
    return _TPU_OPTIONS if mesh.devices.flat[0].device_kind == "TPU v5 lite" else {}
