"""How long a compiled program takes on a topology: the compiler's cycles and what they omit."""

from dataclasses import dataclass

from rpo_jax.sharding.hlo import Kernel, Program, Transfer
from rpo_jax.sharding.topology import DCN_BYTES_PER_S, Topology

# Share of peak that the attention kernels reach, such that the estimate of MaxText's Llama3.1-70B
# on v6e-256 is the published time (tests/benchmarks/calibration.py). It stands for all that the
# cycles of the compiler leave out there; docs/estimates.md tells how far other steps are off.
KERNEL_EFFICIENCY = 0.23

# Matmuls of each splash kernel over queries x keys, by the width they contract or put out.
_MATMULS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
_FUSED = (3, 2)  # of both backward kernels in one


@dataclass(frozen=True)
class Seconds:
    """Of one step on one device; the parts add up.

    Attributes:
        compute: the compiler's cycles.
        kernels: attention kernels, analytic: the compiler has no estimate for them.
        communication: what no compute is scheduled to hide, analytic.
    """

    compute: float
    kernels: float
    communication: float

    @property
    def step(self) -> float:
        """All of it."""
        return self.compute + self.kernels + self.communication


def estimate_seconds(program: Program, topology: Topology, devices: list) -> Seconds:
    """The estimate; `devices` in the order of the mesh, as ids in the program count them.

    A transfer costs max(0, bytes / bandwidth - cycles between its start and its end); transfers are
    taken as if they never shared a link.
    """
    chip = topology.chip
    return Seconds(
        program.cycles / chip.clock_hz,
        sum(kernel_flops(kernel) * kernel.times for kernel in program.kernels)
        / (chip.flops / chip.devices * KERNEL_EFFICIENCY),
        sum(
            max(0.0, _transfer_seconds(t, topology, devices) - t.between_cycles / chip.clock_hz)
            * t.times
            for t in program.transfers
        ),
    )


def kernel_flops(kernel: Kernel) -> float:
    """Of one splash call, by its own shapes; other kernels count nothing.

    Below the diagonal only. Where queries are cut over devices and keys are not, the last queries
    see all keys but half of their own, and every device waits for the one that has them.
    """
    phase = next((name for name in _MATMULS if f"_{name}_" in kernel.name), None)
    if phase is None or len(kernel.shapes) < 3:
        return 0.0
    (heads, queries, score_width), (_, keys, _), (_, _, value_width) = kernel.shapes[:3]
    scores, values = _FUSED if phase == "dkv" and kernel.fused else _MATMULS[phase]
    seen = queries * (keys - queries / 2)
    return 2.0 * heads * seen * (scores * score_width + values * value_width)


def _transfer_seconds(transfer: Transfer, topology: Topology, devices: list) -> float:
    """What a collective takes with all links it can use to itself."""
    chip = topology.chip
    size = topology.slices if transfer.across_slices else len(transfer.group)
    if size < 2:
        return 0.0
    moved = transfer.output_bytes * {
        "all-gather": (size - 1) / size,
        "all-reduce": 2 * (size - 1) / size,
        "reduce-scatter": size - 1.0,
        "all-to-all": (size - 1) / size,
    }.get(transfer.kind, 1.0)
    if transfer.across_slices:
        return moved / (DCN_BYTES_PER_S / chip.devices)
    group = [devices[i] for i in transfer.group]
    link = chip.ici_bytes_per_s / chip.devices / (2 * chip.torus)
    if transfer.kind == "collective-permute":
        return moved / link
    links = 0
    for dimension in range(chip.torus):
        length = len({d.coords[dimension] for d in group})
        if length > 1:
            links += 2 if length % chip.wraps_at == 0 else 1
    return moved / (link * max(links, 1))
