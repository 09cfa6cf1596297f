"""Accelerators that are not here: TPU slices, and GPUs of one host, to compile for."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rpo_jax.errors import UserError, say_install
from rpo_jax.sharding.chips import CHIPS, Chip
from rpo_jax.sharding.gpus import GPUS

DCN_BYTES_PER_S = 50e9 / 8  # a chip, to another slice; of secondary sources

# Slices of one host, where the compiler would take the same shape for several.
_ONE_HOST = {"v5e:1x1": (1, 1, 1), "v6e:1x1": (1, 1, 1), "v5e:2x4": (2, 4, 1), "v6e:2x4": (2, 4, 1)}

_FLAT, _DEEP = ([name for name, chip in CHIPS.items() if chip.torus == n] for n in (2, 3))
_WANTED = (
    "wanted is a chip and the sides of a slice of hosts of 2x2: two sides for "
    f"{', '.join(_FLAT)} (v6e:1x1, v6e:2x4, v6e:8x8), three for {', '.join(_DEEP)} (v5p:2x2x1, "
    f"v5p:4x4x4); 2*v6e:16x16 is two slices; or GPUs of one host: {', '.join(GPUS)} (h100:8)"
)


@dataclass(frozen=True)
class Topology:
    """Chips that are bought together: one slice or several equal ones, or GPUs of a host."""

    name: str
    chip: Chip
    slices: int
    devices: Sequence[Any]  # jax.Device, without a client
    target: str = ""  # what a GPU's compiler was told of it

    @property
    def chips(self) -> int:
        """In all slices."""
        return len(self.devices) // self.chip.devices


@cache
def open_topology(name: str) -> Topology:
    """The devices of a slice by its name: `v6e:8x8`, or `2*v6e:16x16` for two, or `h100:8`.

    They can be compiled for, not run on. Asks no metadata server and needs no accelerator, only the
    package libtpu (extra `tpu`) or the compiler for GPUs (extra `cuda`); call it before anything
    else asks JAX for a TPU.

    Raises:
        UserError: no such chip or shape, or no compiler for it.
    """
    if gpus := re.fullmatch(r"(\w+):([1-8])", name):
        return _open_gpus(name, gpus[1], int(gpus[2]))
    match = re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+):([1-9]\d*(?:x[1-9]\d*)+)", name)
    if not match or match[2] not in CHIPS:
        unknown = match and f"no TPU {match[2]} is known; "
        raise UserError(f"topology {name!r}: {unknown or ''}{_WANTED}")
    slices, shape = int(match[1] or 1), f"{match[2]}:{match[3]}"
    chip, sides = CHIPS[match[2]], [int(n) for n in match[3].split("x")]
    if len(sides) != chip.torus:
        raise UserError(f"topology {name!r} has {len(sides)} sides: {_WANTED}")
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v6e-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options = {"chips_per_host_bounds": _ONE_HOST[shape]} if shape in _ONE_HOST else {}
    if slices > 1:
        options["num_slices"] = slices  # type: ignore[assignment]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    except ImportError as error:
        raise UserError(f"libtpu is not installed: {say_install('tpu')}") from error
    except Exception as error:  # JaxRuntimeError, or RuntimeError where there is no libtpu
        text = str(error)
        if "libtpu" in text and "topology" not in text.lower():
            raise UserError(f"libtpu cannot be loaded ({text}): {say_install('tpu')}") from error
        raise UserError(f"topology {name!r} is not made of whole hosts: {_WANTED}") from error
    wanted = slices * math.prod(sides) * chip.devices
    assert len(described.devices) == wanted, (name, len(described.devices))
    return Topology(name, chip, slices, described.devices)


def _open_gpus(name: str, card: str, count: int) -> Topology:
    if card not in GPUS:
        raise UserError(f"topology {name!r}: {_WANTED}")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[card].describe(), topology=f"1x1x{count}"
        )
    except (ImportError, NotImplementedError) as error:  # there is no such plugin
        raise UserError(
            f"the compiler for GPUs cannot be loaded ({error}): "
            f"{say_install('cuda')}; no GPU is needed"
        ) from error
    return Topology(name, GPUS[card].chip, 1, described.devices, GPUS[card].describe())
