"""The device mesh."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType

from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.errors import UserError


def mesh_sizes(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Devices on each axis, with -1 filled in.

    Raises:
        UserError: the axes do not multiply to `device_count`.
    """
    sizes = dataclasses.asdict(config)
    named = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if device_count % named or (not free and named != device_count):
        asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh ({asked}) wants {named} devices or a multiple, {device_count} are there"
        )
    return {axis: device_count // named if axis in free else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with axes data, fsdp, seq and tensor; by default over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )
