"""TPU slices that are not here: devices to compile for, and what their chips can do."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rpo_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One TPU chip, by the figures of its maker.

    Attributes:
        devices: that JAX shows for a chip.
        hbm_bytes: memory of a chip that a program may use: the compiler refuses larger ones.
        flops: bfloat16 FLOP/s of a chip.
        clock_hz: cycles a second, as the compiler counts them.
        ici_bytes_per_s: that a chip can send over all its links together; it receives as much.
        torus: dimensions of its network; each has two links a chip.
        wraps_at: a dimension of a slice is a ring where its length is a multiple of this.

    Source: Google Cloud, pages of the TPU versions. The clock is peak FLOP/s over the operations of
    the matrix units a cycle; that of v6e is of secondary sources, and TPU7x's is unknown: v6e's.
    """

    devices: int
    hbm_bytes: float
    flops: float
    clock_hz: float
    ici_bytes_per_s: float
    torus: int
    wraps_at: int


_GIB = 2**30
CHIPS = {
    "v4": Chip(2, 2 * 15.25 * _GIB, 275e12, 1.05e9, 300e9, 3, 4),
    "v5e": Chip(1, 15.75 * _GIB, 197e12, 1.5e9, 200e9, 2, 16),
    "v5p": Chip(1, 95.74 * _GIB, 459e12, 1.75e9, 600e9, 3, 4),
    "v6e": Chip(1, 31.25 * _GIB, 918e12, 1.75e9, 400e9, 2, 16),
    "tpu7x": Chip(2, 2 * 94.75 * _GIB, 2307e12, 1.75e9, 1200e9, 3, 4),
}
DCN_BYTES_PER_S = 50e9 / 8  # a chip, to another slice; of secondary sources

# Slices of one host, where the compiler would take the same shape for several.
_ONE_HOST = {"v5e:1x1": (1, 1, 1), "v6e:1x1": (1, 1, 1), "v5e:2x4": (2, 4, 1), "v6e:2x4": (2, 4, 1)}

_FLAT, _DEEP = ([name for name, chip in CHIPS.items() if chip.torus == n] for n in (2, 3))
_WANTED = (
    "wanted is a chip and the sides of a slice of hosts of 2x2: two sides for "
    f"{', '.join(_FLAT)} (v6e:1x1, v6e:2x4, v6e:8x8), three for {', '.join(_DEEP)} (v5p:2x2x1, "
    "v5p:4x4x4); 2*v6e:16x16 is two slices"
)


@dataclass(frozen=True)
class Topology:
    """Chips that are bought together: one slice or several equal ones."""

    name: str
    chip: Chip
    slices: int
    devices: Sequence[Any]  # jax.Device, without a client

    @property
    def chips(self) -> int:
        """In all slices."""
        return len(self.devices) // self.chip.devices


@cache
def open_topology(name: str) -> Topology:
    """The devices of a slice by its name: `v6e:8x8`, or `2*v6e:16x16` for two of them.

    They can be compiled for, not run on. Asks no metadata server and needs no TPU, only the package
    libtpu (extra `tpu`); call it before anything else asks JAX for a TPU.

    Raises:
        UserError: no such chip or shape, or no libtpu.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)\*)?(\w+):([1-9]\d*(?:x[1-9]\d*)+)", name)
    if not match or match[2] not in CHIPS:
        raise UserError(f"topology {name!r}: {_WANTED}")
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
        raise UserError("libtpu is not installed: pip install 'rpo_jax[tpu]'") from error
    except Exception as error:  # JaxRuntimeError, or RuntimeError where there is no libtpu
        text = str(error)
        if "libtpu" in text and "topology" not in text.lower():
            raise UserError(
                f"libtpu cannot be loaded ({text}): pip install 'rpo_jax[tpu]'"
            ) from error
        raise UserError(f"topology {name!r} is not made of whole hosts: {_WANTED}") from error
    wanted = slices * math.prod(sides) * chip.devices
    assert len(described.devices) == wanted, (name, len(described.devices))
    return Topology(name, chip, slices, described.devices)
