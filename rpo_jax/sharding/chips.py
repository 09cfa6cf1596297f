"""What the chips of a TPU slice can do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One chip, by the figures of its maker.

    Attributes:
        devices: that JAX shows for a chip.
        hbm_bytes: memory of a chip that a program may use: the compiler refuses larger ones.
        flops: bfloat16 FLOP/s of a chip.
        clock_hz: cycles a second, as the compiler counts them; 0: it counts none.
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
