"""Our steps of Qwen2.5-72B beside MaxText's, all compiled for 64 v5p chips and read alike.

    python tests/benchmarks/maxtext_step.py --venv VENV --out tests/benchmarks/maxtext_step.json

VENV has Python >= 3.12, `maxtext[tpu]==0.2.5` and this package's requirements: all programs are
compiled in it, by the same libtpu. Another libtpu than its own is the one in a folder that
PYTHONPATH begins with (`pip install --no-deps --target`). Rows of 4096 tokens, flash attention,
AdamW; a row of RPO is a pair, 3072 tokens of prompt and 512 of each response. What was compiled is
found again under --cache. The yardstick is `rpo_jax.sharding`: the compiler's cycles, attention
kernels and exposed communication charged analytically.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from rpo_jax.config import Mesh
from rpo_jax.sharding.hlo import read_program
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.speed import Seconds, estimate_seconds
from rpo_jax.sharding.topology import Topology, open_topology
from rpo_jax.training.run import find_commit
from rpo_jax.writing import write_json

REPO = Path(__file__).resolve().parents[2]
TOPOLOGY, ROW = "v5p:4x4x4", 4096
# Rows a step, fsdp, tensor, remat policy; of ours behind the stage.
THEIRS = [
    (16, 16, 4, "full"),
    (16, 16, 4, "minimal"),
    (64, 64, 1, "full"),
    (64, 64, 1, "minimal"),
]
OURS = [
    ("cpt", 16, 16, 4, "full"),
    ("cpt", 16, 16, 4, "dots"),
    ("cpt", 64, 64, 1, "dots"),
    ("cpt", 64, 32, 2, "dots"),
    ("rpo", 16, 16, 4, "dots"),
    ("rpo", 64, 32, 2, "dots"),
]
# Of every step of MaxText.
_ALWAYS = {
    "compile_topology_num_slices": 1,
    "attention": "flash",
    "dataset_type": "synthetic",
    "run_name": "anchor",
    "enable_checkpointing": False,
    "steps": 10,
    "scan_layers": True,
}
# MaxText's ahead-of-time compiler keeps the executable only; its text is caught on the way.
_CATCH = """
import runpy, sys
from jax.experimental import serialize_executable as serializer
path, serialize = sys.argv.pop(1), serializer.serialize
def keep(compiled, *args, **kwargs):
    open(path, "w").write(compiled.as_text())
    return serialize(compiled, *args, **kwargs)
serializer.serialize = keep
sys.argv[0] = "train_compile"
runpy.run_module("maxtext.trainers.pre_train.train_compile", run_name="__main__")
"""


def compile_theirs(
    venv: Path, cache: Path, name: str, fields: dict[str, Any], flags: str = ""
) -> dict[str, Any]:
    """Compiles MaxText's step; its text, and what its arguments and temporaries take.

    Args:
        venv: where MaxText is installed.
        cache: folder of what was compiled, by name.
        name: of the program.
        fields: of its config.
        flags: of the compiler, beyond its defaults.
    """
    text = cache / f"maxtext-{name}.txt"
    note = text.with_suffix(".json")
    if not note.exists():
        python = venv / "bin" / "python"
        find = "import maxtext; print(maxtext.__path__[0])"
        package = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
        base = Path(package.stdout.split()[-1]) / "configs" / "base.yml"
        with tempfile.TemporaryDirectory() as folder:
            words = _ALWAYS | fields
            words |= {"base_output_directory": folder}
            words |= {"compiled_trainstep_file": f"{folder}/step.pickle"}
            done = subprocess.run(
                [
                    *(python, "-c", _CATCH, text, base),
                    *(f"{name}={value}" for name, value in words.items()),
                ],
                capture_output=True,
                text=True,
                env=_environment() | {"LIBTPU_INIT_ARGS": flags},
            )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-4000:]}")
        sizes = re.findall(r"(argument|temp)_size_in_bytes=(\d+)", done.stdout + done.stderr)
        write_json(note, {name: int(size) for name, size in sizes if int(size)})
    memory = json.loads(note.read_text())
    return {"hlo": text.read_text(), "gb": (memory["argument"] + memory["temp"]) / 1e9}


def compile_beside(
    venv: Path, cache: Path, rows: int, fsdp: int, tensor: int, remat: str
) -> dict[str, Any]:
    """MaxText's step of Qwen2.5-72B's shape."""
    fields = {
        "compile_topology": "v5p-128",
        "model_name": "qwen2.5-14b",
        "override_model_config": True,
        "base_emb_dim": 8192,
        "base_num_query_heads": 64,
        "base_num_kv_heads": 8,
        "base_mlp_dim": 29568,
        "base_num_decoder_layers": 80,
        "ici_fsdp_parallelism": fsdp,
        "ici_tensor_parallelism": tensor,
        "per_device_batch_size": rows / 64,
        "max_target_length": ROW,
        "remat_policy": remat,
    }
    return compile_theirs(venv, cache, f"{rows}-{fsdp}-{tensor}-{remat}", fields)


_COMPILE = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from rpo_jax.cli import load_config
from rpo_jax.model.shape import load_shape
from rpo_jax.sharding.topology import open_topology
from rpo_jax.training.programs import make_job
path, topology, text, *overrides = sys.argv[1:]
config = load_config(path, overrides)
devices = open_topology(topology).devices
job = make_job("step", config, load_shape(config.model.shape), devices)
compiled = job.lower().compile()
memory = compiled.memory_analysis()
open(text, "w").write(compiled.as_text())
print(json.dumps([memory.argument_size_in_bytes, memory.temp_size_in_bytes]))
"""


def compile_ours(
    venv: Path, cache: Path, stage: str, rows: int, fsdp: int, tensor: int, remat: str
) -> dict[str, Any]:
    """Compiles our step of the same shape, in the same environment."""
    text = cache / f"ours-{stage}-{rows}-{fsdp}-{tensor}-{remat}.txt"
    note = text.with_suffix(".json")
    if not note.exists():
        fields = {
            "mesh.data": 1,
            "mesh.fsdp": fsdp,
            "mesh.tensor": tensor,
            "train.batch_rows": rows,
            "train.micro_batches": 1,
            "data.row_length": ROW,
            "data.prompt_length": ROW * 3 // 4,
            "data.response_length": ROW // 8,
            "model.remat": remat,
        }
        done = subprocess.run(
            [
                *(venv / "bin" / "python", "-c", _COMPILE),
                *(f"{REPO}/configs/qwen25_72b_{stage}.py:{TOPOLOGY}", TOPOLOGY, text),
                *(f"--config.{name}={value}" for name, value in fields.items()),
            ],
            capture_output=True,
            text=True,
            check=True,
            env=_environment() | {"PYTHONPATH": f"{REPO}:{os.environ.get('PYTHONPATH', '')}"},
        )
        write_json(note, json.loads(done.stdout.splitlines()[-1]))
    return {"hlo": text.read_text(), "gb": sum(json.loads(note.read_text())) / 1e9}


def _environment() -> dict[str, str]:
    """Without the compiler that this process uses: `venv` has its own."""
    inherited = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def estimate(hlo: str, topology: Topology, tensor: int) -> Seconds:
    """Of a step, by the one yardstick; what is not tensor parallelism is FSDP."""
    fsdp = len(topology.devices) // tensor
    mesh = make_mesh(Mesh(data=1, fsdp=fsdp, tensor=tensor), topology.devices)
    return estimate_seconds(read_program(hlo), topology, list(mesh.devices.flat))


def read(compiled: Any, rows: int, tensor: int) -> dict[str, float]:
    """GB a chip, seconds, and the share of peak."""
    topology = open_topology(TOPOLOGY)
    seconds = estimate(compiled["hlo"], topology, tensor)
    work = 6 * 72.7062e9 * rows * ROW
    return {
        "gb_a_chip": round(compiled["gb"], 2),
        "compute_s": round(seconds.compute, 3),
        "kernels_s": round(seconds.kernels, 3),
        "exposed_s": round(seconds.communication, 3),
        "step_s": round(seconds.step, 3),
        "share_of_peak": round(work / seconds.step / topology.chip.flops / topology.chips, 3),
    }


def list_versions(venv: Path) -> dict[str, str]:
    """Of what compiles there."""
    pip = [venv / "bin" / "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(pip, capture_output=True, text=True, check=True).stdout)
    return {e["name"]: e["version"] for e in listed if e["name"] in ("maxtext", "jax", "libtpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True, help="where MaxText is installed")
    parser.add_argument("--cache", type=Path, default=REPO / "runs" / "maxtext")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    versions = list_versions(args.venv)
    cache = args.cache / versions["libtpu"]
    cache.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    cases = [("MaxText", compile_beside, case, case) for case in THEIRS]
    cases += [(f"ours, {stage}", compile_ours, (stage, *case), case) for stage, *case in OURS]
    for name, make, what, (rows, fsdp, tensor, remat) in cases:
        key = f"{name}: {rows} rows, fsdp {fsdp} x tensor {tensor}, remat {remat}"
        found[key] = read(make(args.venv, cache, *what), rows, tensor)
        print(key, found[key], flush=True)
    result = {
        "command": "maxtext_step.py --venv VENV",
        "date": time.strftime("%Y-%m-%d"),
        "commit": find_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
        "topology": TOPOLOGY,
        "steps": found,
    }
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
