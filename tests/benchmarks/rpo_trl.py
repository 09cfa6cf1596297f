"""An RPO step of ours against one of TRL: the same work, each in a process of its own, in turns.

    python tests/benchmarks/rpo_trl.py --steps 3 --rounds 2 --out rpo.json

A Qwen2 of 178 million weights (8 layers, width 512, 8 heads, 2 kv heads, MLP 1408, vocabulary
151936, untied), float32, two pairs a step with prompts of 512 tokens and responses of 128 to 160,
reference log-probabilities precomputed on both sides, AdamW. Seconds are medians over the steps
after the first; the memory is the peak of the process less what it held before the first step, the
gradients, and AdamW's moments where they are made in that step. The matmul roofline is the best
rate of square float32 products by either library, measured in the same run.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rpo_jax.config import Config, Data, Train
from rpo_jax.model.shape import ModelShape, shape_to_hf

REPO = Path(__file__).resolve().parents[2]
SHAPE = ModelShape(
    vocab_size=151936,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=32768,
)
LENGTHS = [(512, 160, 128), (512, 144, 150)]  # prompt, chosen and rejected of each pair
WORDS = 10_000  # ids that occur
EOS = 0


def make_pairs() -> list[dict[str, np.ndarray]]:
    """Two pairs of random ids; responses end in end-of-text."""
    rng = np.random.default_rng(0)
    pairs = []
    for lengths in LENGTHS:
        prompt, chosen, rejected = (rng.integers(1, WORDS, n).astype(np.int32) for n in lengths)
        chosen[-1] = rejected[-1] = EOS
        pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return pairs


class PeakMemory:
    """The largest resident set of this process since `start`, in bytes, looked at often."""

    def start(self) -> None:
        self.before = self.peak = _resident()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, _resident())
            time.sleep(0.005)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def best_rate(multiply: Callable[[], Any], flops: float, tries: int = 5) -> float:
    """FLOP/s of the fastest of several calls."""
    multiply()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds)


def run_ours(steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Our step, as `train` runs it."""
    import jax
    import jax.numpy as jnp

    from rpo_jax.model.qwen2 import Network
    from rpo_jax.sharding.mesh import make_mesh
    from rpo_jax.training.evaluation import put_batch
    from rpo_jax.training.metrics import count_flops
    from rpo_jax.training.optim import make_optimizer
    from rpo_jax.training.state import abstract_state, make_params, start_from
    from rpo_jax.training.step import make_score, make_step
    from rpo_jax.training.workload import make_workload

    matrix = jnp.ones((3000, 3000))
    product = jax.jit(jnp.matmul)
    rate = best_rate(lambda: product(matrix, matrix).block_until_ready(), 2 * 3000**3)

    config = Config(
        stage="rpo", name="benchmark", init_from="itself", train=Train(steps=100, batch_rows=2)
    )
    config = replace(config, data=Data(prompt_length=512, response_length=160))
    for section, values in settings.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    network = Network(SHAPE, remat=config.model.remat, scan_layers=config.model.scan_layers)
    work = make_workload(config, network, make_mesh(config.mesh, jax.devices()[:1]))
    rows = [work.make_row([pair]) for pair in make_pairs()]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    tx = make_optimizer(config.optim)
    abstract = abstract_state(network, tx, work.mesh)
    memory, seconds = PeakMemory(), []
    with jax.set_mesh(work.mesh):
        state = start_from(make_params(network, work.mesh, seed=0), tx, abstract)
        score = make_score(work, abstract.params)
        batch["reference_logps"] = np.asarray(score(state.params, put_batch(batch, work.mesh)))
        placed = put_batch(batch, work.mesh)
        step = make_step(work, tx, abstract).lower(state, {}, work.hyper, placed).compile()
        memory.start()
        for _ in range(steps + 1):
            start = time.perf_counter()
            state, metrics = step(state, {}, work.hyper, placed)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    return {
        "seconds": seconds[1:],
        "extra_bytes": memory.peak - memory.before - gradients,
        "planned_bytes": step.memory_analysis().temp_size_in_bytes - gradients,
        "flops": count_flops(network, batch),
        "matmul_flops_per_s": rate,
        "loss": float(metrics["loss"]),
    }


def run_trl(steps: int) -> dict[str, Any]:
    """TRL's trainer, as its `train` runs it, without gradient checkpointing."""
    import datasets
    import torch
    import transformers
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.set_num_threads(os.cpu_count() or 1)
    matrix = torch.ones((3000, 3000))
    rate = best_rate(lambda: matrix @ matrix, 2 * 3000**3)

    words = {"<eos>": EOS} | {f"t{i}": i for i in range(1, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("prompt", "chosen", "rejected")
    rows = [
        {name: "".join(f" t{i}" for i in pair[f"{name}_ids"] if i != EOS) for name in names}
        for pair in make_pairs()
    ]
    seconds: list[float] = []
    memory = PeakMemory()

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not seconds:
                memory.start()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape_to_hf(SHAPE))),
            args=trl.DPOConfig(
                output_dir=folder,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, 1.0],
                precompute_ref_log_probs=True,
                per_device_train_batch_size=2,
                max_steps=steps + 1,
                max_length=None,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
            ),
            callbacks=[Clock()],
        )
        loss = trainer.train().training_loss
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return {
        "seconds": seconds[1:],
        "extra_bytes": memory.peak - memory.before - 3 * weights,  # gradients and two moments
        "matmul_flops_per_s": rate,
        "loss": loss,
    }


def run_side(side: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One side in a fresh process."""
    command = [sys.executable, __file__, f"--side={side}", f"--steps={steps}"]
    command.append(f"--settings={json.dumps(settings)}")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="measured steps a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turns")
    parser.add_argument("--settings", type=json.loads, default={}, help="of our config, as JSON")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    parser.add_argument("--side", choices=("ours", "trl"), help="run one side and print its JSON")
    args = parser.parse_args()
    if args.side:
        found = run_ours(args.steps, args.settings) if args.side == "ours" else run_trl(args.steps)
        print(json.dumps(found))
        return
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(args.rounds):
        for side, found in sides.items():
            found.append(run_side(side, args.steps, args.settings))
    seconds = {
        side: statistics.median(s for run in found for s in run["seconds"])
        for side, found in sides.items()
    }
    extra = {side: max(run["extra_bytes"] for run in found) for side, found in sides.items()}
    roofline = max(run["matmul_flops_per_s"] for found in sides.values() for run in found)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "command": f"{Path(__file__).name} {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("jax", "torch", "transformers", "trl")},
        "seconds_a_step": seconds,
        "times_trl": seconds["trl"] / seconds["ours"],
        "roofline_gflops_per_s": roofline / 1e9,
        "share_of_roofline": sides["ours"][0]["flops"] / seconds["ours"] / roofline,
        "extra_gib": {side: size / 2**30 for side, size in extra.items()},
        "extra_share_of_trl": extra["ours"] / extra["trl"],
        "runs": sides,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
