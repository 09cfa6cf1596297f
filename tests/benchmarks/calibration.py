"""Published steps of MaxText on real slices beside what the estimate says of the same steps.

    python tests/benchmarks/calibration.py --venv VENV --out tests/benchmarks/calibration.json

VENV has Python >= 3.12 and `maxtext[tpu]==0.2.5`. Its steps are compiled for the published slices,
with the published settings, and read by the yardstick of `rpo_jax.plan`. The efficiency of the
attention kernels is fitted on the first step; the others say how far the estimate is off.

What was timed then was of older releases of MaxText and of the compiler. Flags that newer compilers
refuse on a chip (gathers fused with compute: all chips but v5e) are left out; and where a new one
cuts the products of tensor parallelism into windows, the step is also compiled without.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":  # run as a script, the folder of the repository is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rpo_jax.sharding.speed import KERNEL_EFFICIENCY, Seconds
from rpo_jax.sharding.topology import open_topology
from rpo_jax.writing import write_json
from tests.benchmarks.maxtext_step import compile_theirs, estimate, list_versions
from tests.benchmarks.provenance import REPO, describe_run

_OVERLAP = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true "
)
_FUSED_GATHERS = (
    "--xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true "
)
_V5P_FLAGS = _OVERLAP + (
    "--xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true "
    "--xla_tpu_enable_ag_backward_pipelining=true"
)
_V6E_FLAGS = _OVERLAP + (
    "--xla_tpu_scoped_vmem_limit_kib=98304 "
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true "
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 "
    "--xla_tpu_assign_all_reduce_scatter_layout=true "
    "--xla_tpu_enable_all_experimental_scheduler_features=true "
    "--xla_tpu_enable_scheduler_memory_pressure_tracking=true "
    "--xla_tpu_host_transfer_overlap_limit=24 --xla_tpu_aggressive_opt_barrier_removal=ENABLED "
    "--xla_lhs_prioritize_async_depth_over_stall=ENABLED "
    "--xla_tpu_enable_ag_backward_pipelining=true "
    "--xla_should_allow_loop_variant_parameter_in_chain=ENABLED "
    "--xla_should_add_loop_invariant_op_in_chain=ENABLED --xla_max_concurrent_host_send_recv=100 "
    "--xla_tpu_scheduler_percent_shared_memory_limit=100 --xla_latency_hiding_scheduler_rerun=2"
)
_BLOCKS = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
_LLAMA_70B: dict[str, Any] = {
    "model_name": "llama3.1-70b",
    "ici_fsdp_parallelism": -1,
    "max_target_length": 8192,
    "remat_policy": "custom",
    **dict.fromkeys(("decoder_layer_input", "query_proj", "key_proj", "value_proj"), "offload"),
    "use_iota_embed": True,
    "sa_use_fused_bwd_kernel": True,
    **{f"sa_block_{name}": 2048 for name in _BLOCKS},
}
_64B: dict[str, Any] = {
    "global_parameter_scale": 64,
    "max_target_length": 2048,
    "use_iota_embed": True,
}
_64B_ON_V5P: dict[str, Any] = {
    **_64B,
    "compile_topology": "v5p-128",
    "per_device_batch_size": 3,
    "remat_policy": "minimal",
    "ici_fsdp_parallelism": -1,
    "ici_tensor_parallelism": 4,
}
_RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes, training/trillium/Llama3.1-70B-MaxText"
_CONFIGS = "https://github.com/AI-Hypercomputer/maxtext, MaxText/configs"


@dataclass(frozen=True)
class Anchor:
    """A step that was timed on a real slice.

    Attributes:
        name: the slice as MaxText calls it, and what runs on it.
        slice: as `rpo_jax.plan` calls it.
        tensor: parallelism; the rest of the slice is FSDP.
        fields: of MaxText's config.
        flags: of the compiler.
        seconds: that a step took.
        source: who says so.
    """

    name: str
    slice: str
    tensor: int
    fields: dict[str, Any]
    flags: str
    seconds: float
    source: str


def seconds_of_64b(rows: int, tflops: float) -> float:
    """Of a step of MaxText's 64B with `rows` of 2048 tokens a chip, from its TFLOP/s a chip.

    As MaxText counted: 6 a weight that multiplies, and attention without a causal mask.
    """
    layers, width, mlp, vocabulary, length = 64, 8192, 28672, 32000, 2048
    weights = layers * (4 * width**2 + 3 * width * mlp) + width * vocabulary
    return (6 * weights + 12 * layers * length * width) * rows * length / (tflops * 1e12)


ANCHORS = (
    Anchor(
        "v6e-256 Llama3.1-70B, 5 rows of 8192 a chip",
        "v6e:16x16",
        1,
        {**_LLAMA_70B, "compile_topology": "v6e-256", "per_device_batch_size": 5},
        _V6E_FLAGS,
        42.656,
        f"{_RECIPES}/v6e-256",
    ),
    Anchor(
        "v6e-64 Llama3.1-70B, 2 rows of 8192 a chip",
        "v6e:8x8",
        1,
        {**_LLAMA_70B, "compile_topology": "v6e-64", "per_device_batch_size": 2},
        _V6E_FLAGS,
        18.688,
        f"{_RECIPES}/v6e-64",
    ),
    Anchor(
        "v5p-128 64B, 3 rows of 2048 a chip",
        "v5p:4x4x4",
        4,
        _64B_ON_V5P,
        _V5P_FLAGS,
        seconds_of_64b(3, 323),
        f"{_CONFIGS}/v5p",
    ),
    Anchor(
        "v5p-128 64B without windowed products, 3 rows of 2048 a chip",
        "v5p:4x4x4",
        4,
        _64B_ON_V5P,
        _V5P_FLAGS + " --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
        seconds_of_64b(3, 323),
        f"{_CONFIGS}/v5p",
    ),
    Anchor(
        "v5e-256 64B, 2 rows of 2048 a chip",
        "v5e:16x16",
        1,
        {
            **_64B,
            "compile_topology": "v5e-256",
            "per_device_batch_size": 2,
            "remat_policy": "full",
        },
        _OVERLAP + _FUSED_GATHERS,
        seconds_of_64b(2, 118),
        f"{_CONFIGS}/v5e",
    ),
)


def read(anchor: Anchor, venv: Path, cache: Path) -> Seconds:
    """What the yardstick says of it."""
    name = anchor.name.partition(",")[0].replace(" ", "-")
    hlo = compile_theirs(venv, cache, name, anchor.fields, anchor.flags)["hlo"]
    return estimate(hlo, open_topology(anchor.slice), anchor.tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="where MaxText is installed")
    parser.add_argument("--cache", type=Path, default=REPO / "runs" / "maxtext")
    parser.add_argument("--only", default="", help="of the steps after the first: with this word")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    args.cache.mkdir(parents=True, exist_ok=True)
    efficiency, found = 0.0, []
    for anchor in ANCHORS:
        if efficiency and args.only not in anchor.name:
            continue
        seconds = read(anchor, args.venv, args.cache)
        at_peak = seconds.kernels * KERNEL_EFFICIENCY
        rest = seconds.compute + seconds.communication
        efficiency = efficiency or at_peak / (anchor.seconds - rest)
        row = {
            **asdict(seconds),
            "estimate": seconds.step,
            "fitted": rest + at_peak / efficiency,
            "published": anchor.seconds,
        }
        row |= {
            f"{name}_over_published": row[name] / anchor.seconds
            for name in row
            if name in ("estimate", "fitted")
        }
        row = {name: round(value, 4) for name, value in row.items()}
        found.append({"name": anchor.name, **row, "source": anchor.source})
        print(anchor.name, row, flush=True)
    print(f"efficiency of the attention kernels, fitted on the first: {efficiency:.3f}")
    if args.out:
        fitted = {"kernel_efficiency": round(efficiency, 4), "steps": found}
        write_json(args.out, describe_run() | {"versions": list_versions(args.venv)} | fitted)


if __name__ == "__main__":
    main()
