"""Our generation against transformers' `generate`: the same work, in processes that take turns.

    python tests/benchmarks/generate_transformers.py --out generate_transformers.json

Greedy, float32, 16 prompts of 960 to 1040 tokens of which the first 900 are the same (as few-shot
examples are), 128 new tokens each, random weights. Both sides get the prompts as they are, through
the call that a user makes; ours finds the shared prefix by itself, and transformers pads on the
left. A call with one new token is the prefill, the rest of a call with 128 is the decode. Programs
are compiled, and both sides warm, before the clock runs; ours says how long compiling took.

Seconds are medians: by the clock, and of processor time over the number of cores, which others at
work on the machine disturb less. The limit of the decode by memory bandwidth is the weights, and
the keys and values that are there, read once a step, at the rate of a large copy (bytes read and
written) in the same run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(REPO))

from rpo_jax.model.shape import ModelShape, load_shape, shape_to_hf  # noqa: E402
from tests.benchmarks.rpo_trl import SHAPE as SHAPE_178M  # noqa: E402
from tests.benchmarks.rpo_trl import Clock  # noqa: E402

ROWS, SHARED, OWN, NEW = 16, 900, (60, 140), 128
SHAPES = {"178m": SHAPE_178M, "qwen2.5-0.5b": load_shape("qwen2.5-0.5b")}


def make_prompts(shape: ModelShape) -> list[list[int]]:
    """Prompts of random ids, which begin alike."""
    rng = np.random.default_rng(0)
    shared = rng.integers(1, shape.vocab_size - 1, SHARED).tolist()
    lengths = np.linspace(*OWN, ROWS).round().astype(int)
    return [shared + rng.integers(1, shape.vocab_size - 1, n).tolist() for n in lengths]


def make_model(shape: ModelShape) -> Any:
    """The weights of both sides."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape_to_hf(shape))).eval()


def measure_copy() -> float:
    """Bytes a second, read and written, of the fastest of several copies of 512 MiB."""
    import torch

    source = torch.ones(2**27)
    target = torch.empty_like(source)
    seconds = [time_call(lambda: target.copy_(source)) for _ in range(8)]
    return 2 * source.nbytes / min(seconds)


def measure_matmul() -> float:
    """FLOP/s of the fastest of several square float32 products."""
    import torch

    matrix = torch.ones((3000, 3000))
    return 2 * 3000**3 / min(time_call(lambda: matrix @ matrix) for _ in range(5))


def time_call(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run_transformers(shape: ModelShape, repeats: int) -> dict[str, Any]:
    """transformers' `generate`, as it comes."""
    import torch

    model = make_model(shape)
    prompts = make_prompts(shape)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(count: int) -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return out[:, longest:].tolist()

    generate(2)
    return measure(generate, repeats)


def run_ours(shape: ModelShape, repeats: int) -> dict[str, Any]:
    """Ours, through the library call."""
    import jax
    import jax.numpy as jnp

    from rpo_jax.config import Mesh
    from rpo_jax.data.tokenizer import Tokenizer
    from rpo_jax.generation.batching import make_generate
    from rpo_jax.generation.requests import Request, Settings
    from rpo_jax.model.cache import split_layers
    from rpo_jax.model.qwen2 import Network
    from rpo_jax.sharding.mesh import make_mesh
    from rpo_jax.weights.names import from_hf, list_tensors

    model = make_model(shape)
    named = {name: value.detach().numpy() for name, value in model.named_parameters()}
    stacks: dict[str, list[np.ndarray]] = {}
    for tensor in list_tensors(shape):
        stacks.setdefault(tensor.path, []).append(from_hf(named[tensor.name], tensor))
    params: dict[str, Any] = {"layers": {}}
    for path, values in stacks.items():
        node = params
        *parents, last = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jnp.array(np.stack(values) if path.startswith("layers/") else values[0])
    del model, named, stacks, values
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    params = jax.block_until_ready(split_layers(params, give_up=True, turned=True))
    tokenizer = Tokenizer(  # an end that is never drawn: every row writes all its tokens
        shape.vocab_size, shape.vocab_size - 1, "", b"", "", {}, lambda _: [], lambda _: ""
    )
    call = make_generate(Network(shape), mesh, tokenizer, slots=ROWS)
    prompts = make_prompts(shape)

    def generate(count: int) -> list[list[int]]:
        settings = Settings(max_tokens=count)
        requests = [Request(str(i), p, settings=settings) for i, p in enumerate(prompts)]
        done = {completion.id: completion for completion in call(params, requests)}
        return [list(done[str(i)].token_ids) for i in range(ROWS)]

    first = time_call(lambda: (generate(1), generate(NEW)))
    found = measure(generate, repeats)
    clock = found["seconds"]["clock"]
    found["compile_seconds"] = first - clock["prefill"][0] - clock["all"][0]
    return found


def measure(generate: Callable[[int], list[list[int]]], repeats: int) -> dict[str, Any]:
    """Seconds of calls with one and with all new tokens, in turns, and what the last one wrote."""
    prefill, total = Clock(), Clock()
    for _ in range(repeats):
        prefill.start()
        generate(1)
        prefill.stop()
        total.start()
        tokens = generate(NEW)
        total.stop()
    seconds = {
        name: {"prefill": prefill.seconds[name], "all": total.seconds[name]}
        for name in prefill.seconds
    }
    return {"seconds": seconds, "tokens": tokens}


def count_bytes(shape: ModelShape) -> float:
    """Bytes that a step must read: weights, and keys and values of the step in the middle."""
    width, kv = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    layer = 2 * width * width + 2 * width * kv + 3 * width * shape.intermediate_size
    weights = shape.num_hidden_layers * layer + shape.vocab_size * width
    tokens = SHARED + ROWS * (sum(OWN) / 2 + NEW / 2)
    return 4 * (weights + shape.num_hidden_layers * 2 * kv * tokens)


def run_side(side: str, shape: str, repeats: int) -> dict[str, Any]:
    """One side in a fresh process."""
    command = [sys.executable, __file__, f"--side={side}", f"--shape={shape}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, f"--repeats={repeats}"],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Both sides in turns; medians, their ratios, and the distance from the limits."""
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for side, found in sides.items():
            found.append(run_side(side, shape, repeats))
    # How many tokens of each row agree before a near tie of the random weights falls otherwise.
    written = (np.array(found[0]["tokens"]) for found in sides.values())
    agree = np.cumprod(np.equal(*written), axis=1).sum(axis=1).tolist()
    for run in (run for found in sides.values() for run in found):
        del run["tokens"]
    copy = max(run["copy_bytes_per_s"] for found in sides.values() for run in found)
    matmul = max(run["matmul_flops_per_s"] for found in sides.values() for run in found)
    needed = count_bytes(SHAPES[shape])
    result: dict[str, Any] = {
        "bytes_a_step": needed,
        "copy_bytes_per_s": copy,
        "matmul_flops_per_s": matmul,
    }
    for clock in ("clock", "processor"):
        seconds = {}
        for side, found in sides.items():
            prefill, total = (
                statistics.median(s for run in found for s in run["seconds"][clock][part])
                for part in ("prefill", "all")
            )
            step = (total - prefill) / (NEW - 1)
            seconds[side] = {"all": total, "prefill": prefill, "decode_step": step}
        result[f"by_{clock}"] = {
            "seconds": seconds,
            "times_transformers": {
                part: seconds["transformers"][part] / seconds["ours"][part]
                for part in seconds["ours"]
            },
            "share_of_bandwidth_limit": {
                side: needed / copy / seconds[side]["decode_step"] for side in sides
            },
        }
    return {**result, "tokens_that_agree": agree, "runs": sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turns")
    parser.add_argument("--repeats", type=int, default=2, help="measured calls a process")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    parser.add_argument("--side", choices=("ours", "transformers"), help="run one, print its JSON")
    parser.add_argument("--shape", choices=SHAPES, help="for --side")
    args = parser.parse_args()
    if args.side:
        run = run_ours if args.side == "ours" else run_transformers
        found = run(SHAPES[args.shape], args.repeats)
        rates = {"copy_bytes_per_s": measure_copy(), "matmul_flops_per_s": measure_matmul()}
        print(json.dumps(found | rates))
        return
    result = {
        "command": f"{Path(__file__).name} {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True
        ).stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("jax", "torch", "transformers")},
        "shapes": {shape: compare(shape, args.rounds, args.repeats) for shape in args.shapes},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
