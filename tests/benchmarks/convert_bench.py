"""How fast, and in how much memory, a large checkpoint goes in and out, against `cp`.

    python tests/benchmarks/convert_bench.py --folder /scratch --out convert.json

The widths are those of Qwen2.5-72B with fewer layers, so that the largest tensors are the real
ones. Five layers are 13.8 GB, and three copies of that lie on the disk at a time. Run as root for a
cold page cache; the result says whether it was cold. All times end when the data is on the disk.

With --run_layers what a run saves from a mesh of 8 is exported too: Orbax lays that out in another
way. The writing takes memory for the whole of it, 5 GB and 1.8 GB a layer.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from rpo_jax.model.shape import load_shape, shape_to_hf
from rpo_jax.weights.names import list_tensors
from rpo_jax.weights.shards import make_index, make_shard

REPO = Path(__file__).resolve().parents[2]
SHARD_BYTES = 4 * 10**9


def write_source(folder: Path, layers: int) -> int:
    """A synthetic checkpoint of random bf16 values below 2 in size; its bytes."""
    folder.mkdir(parents=True)
    shape = replace(load_shape("qwen2.5-72b"), num_hidden_layers=layers)
    (folder / "config.json").write_text(json.dumps(shape_to_hf(shape)))
    groups, size = [[]], 0
    for tensor in list_tensors(shape):
        more = 2 * int(np.prod(tensor.hf_shape))
        if size and size + more > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((tensor.name, tensor.hf_shape))
        size += more
    rng = np.random.default_rng(0)
    shards = []
    for number, group in enumerate(groups, 1):
        shard = make_shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group, "BF16")
        shards.append(shard)
        with (folder / shard.file).open("wb") as file:
            header = shard.header.encode()
            file.write(len(header).to_bytes(8, "little") + header)
            left = sum(entry.size for entry in shard.entries)
            while left:
                block = rng.integers(0, 2**16, min(left, 2**26) // 2, np.uint16)
                block &= 0xBFFF  # no exponent of all ones: finite
                file.write(block)
                left -= block.nbytes
    (folder / "model.safetensors.index.json").write_bytes(make_index(shards))
    return sum(shard.size for shard in shards)


def write_run(folder: Path, layers: int) -> int:
    """What a run on fsdp=8 saves, of the same random values; the bytes of its weights."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import ml_dtypes

    from rpo_jax.config import Checkpoint, Mesh
    from rpo_jax.model.qwen2 import Network
    from rpo_jax.sharding.mesh import make_mesh
    from rpo_jax.training.checkpoint import open_checkpoints
    from rpo_jax.training.state import abstract_weights

    shape = replace(load_shape("qwen2.5-72b"), num_hidden_layers=layers)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(shape_to_hf(shape)))
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        bits = rng.integers(0, 2**16, leaf.shape, np.uint16) & 0xBFFF
        return jax.device_put(bits.view(ml_dtypes.bfloat16), leaf.sharding)

    mesh = make_mesh(Mesh(data=1, fsdp=8, seq=1, tensor=1))
    weights = jax.tree.map(fill, abstract_weights(Network(shape, param_dtype="bfloat16"), mesh))
    with open_checkpoints(folder, Checkpoint(keep=1)) as checkpoints:
        checkpoints.save_checkpointables(0, {"params": weights})
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def forget_pages() -> bool:
    """Writes everything out and empties the page cache; whether that was allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def measure(words: list[str], nice: int) -> dict[str, float]:
    """Seconds until the data is on disk, and the peak of anonymous memory, of a command."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(words, cwd=REPO)
    os.setpriority(os.PRIO_PROCESS, process.pid, nice)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines()
        peak = max([peak, *(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))])
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed with status {process.returncode}")
    os.sync()
    return {"seconds": time.perf_counter() - start, "peak_anonymous_gib": peak / 2**20}


def same_files(one: Path, other: Path) -> bool:
    """Whether every file of `one` is in `other`, byte for byte."""
    return all(
        subprocess.run(["cmp", "-s", path, other / path.name]).returncode == 0
        for path in one.iterdir()
    )


def main() -> None:
    """Measures cp, import and export, in that order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--ram_budget_gib", type=float, default=2.0)
    parser.add_argument("--nice", type=int, default=0, help="of all commands; root may go below 0")
    parser.add_argument("--run_layers", type=int, default=0, help="of a run exported too; 0: none")
    parser.add_argument("--out", type=Path, required=True, help="JSON with the figures")
    args = parser.parse_args()
    root = args.folder / "convert_bench"
    source, model, out = root / "source", root / "model", root / "out"
    convert = [sys.executable, "-m", "rpo_jax.convert"]
    budget = f"--ram_budget_gib={args.ram_budget_gib}"
    commands = {
        "cp": ["cp", "-r", str(source), str(root / "copy")],
        "import": [*convert, "import", f"--source={source}", f"--target={model}", budget],
        "export": [
            *convert,
            "export",
            f"--source={model}",
            f"--target={out}",
            "--base=none",
            budget,
        ],
        "cp_again": ["cp", "-r", str(source), str(root / "copy")],
    }
    try:
        size = write_source(source, args.layers)
        figures, cold = {}, True
        for name, words in commands.items():
            cold = forget_pages() and cold
            figures[name] = measure(words, args.nice)
            figures[name]["mb_per_s"] = size / 1e6 / figures[name]["seconds"]
            print(name, figures[name], flush=True)
            if name.startswith("cp"):
                shutil.rmtree(root / "copy")
            if name == "export":
                identical = same_files(source, out)
                shutil.rmtree(model)
                shutil.rmtree(out)
        shutil.rmtree(source)
        if args.run_layers:
            run_size = write_run(model, args.run_layers)
            cold = forget_pages() and cold
            figures["export_of_run"] = measure(commands["export"], args.nice)
            figures["export_of_run"]["bytes"] = run_size
            print("export_of_run", figures["export_of_run"], flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    # The faster of the two copies is what we are held against.
    cp = min(figures["cp"]["seconds"], figures["cp_again"]["seconds"])
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "command": f"{Path(__file__).name} --layers={args.layers} {budget} --nice={args.nice} "
        f"--run_layers={args.run_layers}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "checkpoint_bytes": size,
        "cold_cache": cold,
        "figures": figures,
        "import_rate_over_cp": cp / figures["import"]["seconds"],
        "export_rate_over_cp": cp / figures["export"]["seconds"],
        "byte_identical": identical,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
