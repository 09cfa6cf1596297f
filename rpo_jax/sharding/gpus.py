"""GPUs that are not here: what their compiler must know of them to compile without one.

Source: NVIDIA's data sheets, and the properties that CUDA reports of the cards.
"""

from dataclasses import dataclass

from rpo_jax.sharding.chips import Chip

_MIB = 2**20
# Of a card's memory jax takes so much by default; XLA_PYTHON_CLIENT_MEM_FRACTION, which can have it
# take more, is not looked at here: what fits by this account has some room.
_JAX_TAKES = 0.75


@dataclass(frozen=True)
class Gpu:
    """A card, as CUDA reports it.

    Attributes:
        name: as it calls itself.
        capability: of CUDA, major and minor.
        cores: multiprocessors.
        threads: that a multiprocessor holds.
        lanes: float32 units of a multiprocessor.
        shared_bytes: memory that the blocks of a multiprocessor share, and that one may take.
        cache_bytes: of the second level.
        memory_mib: of the card.
        memory_bytes_per_s: to and from it.
        clock_ghz: at most.
        flops: bfloat16 FLOP/s, dense.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    threads: int
    lanes: int
    shared_bytes: tuple[int, int]
    cache_bytes: int
    memory_mib: int
    memory_bytes_per_s: float
    clock_ghz: float
    flops: float

    @property
    def chip(self) -> Chip:
        """What a program may use of it. Its compiler counts no cycles, so there is no clock."""
        return Chip(1, _JAX_TAKES * self.memory_mib * _MIB, self.flops, 0.0, 0.0, 0, 0)

    def describe(self) -> str:
        """The card as XLA's `GpuTargetConfigProto`, in text."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_bytes[0]}
              shared_memory_per_block_optin: {self.shared_bytes[1]}
              threads_per_core_limit: {self.threads}
              core_count: {self.cores}
              fpus_per_core: {self.lanes}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {int(self.memory_bytes_per_s)}
              l2_cache_size: {self.cache_bytes}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_mib * _MIB}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 7 }}
            runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.name}"
        """


GPUS = {
    "l4": Gpu(
        "NVIDIA L4",
        (8, 9),
        cores=58,
        threads=1536,
        lanes=128,
        shared_bytes=(102_400, 101_376),
        cache_bytes=48 * _MIB,
        memory_mib=22_500,
        memory_bytes_per_s=300e9,
        clock_ghz=2.04,
        flops=121e12,
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-40GB",
        (8, 0),
        cores=108,
        threads=2048,
        lanes=64,
        shared_bytes=(167_936, 166_912),
        cache_bytes=40 * _MIB,
        memory_mib=40_440,
        memory_bytes_per_s=1555e9,
        clock_ghz=1.41,
        flops=312e12,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        cores=132,
        threads=2048,
        lanes=128,
        shared_bytes=(233_472, 232_448),
        cache_bytes=50 * _MIB,
        memory_mib=80_995,
        memory_bytes_per_s=3352e9,
        clock_ghz=1.98,
        flops=989e12,
    ),
}
