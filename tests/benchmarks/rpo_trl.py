"""A step of ours against one of the peers: the same work, each in a process of its own, in turns.

    python tests/benchmarks/rpo_trl.py --workload rpo --steps 3 --rounds 2 --out rpo_trl.json

A Qwen2 of 178 million weights (8 layers, width 512, 8 heads, 2 kv heads, MLP 1408, vocabulary
151936, untied), float32, AdamW. Three workloads: `rpo`, two pairs a step with prompts of 512 tokens
and responses of 128 to 160; `exam`, a pair with a real 3-shot prompt of the exam, whose responses
are 300 tokens of exam text in the place of explanations; `cpt`, four rows of 512 tokens. The peer
of the first two is TRL's trainer with sigmoid + sft, reference log-probabilities precomputed on
both sides; of the last transformers' loss with torch's AdamW.

Seconds are medians over the steps after the first: by the clock, and of processor time over the
number of cores, which others at work on the machine disturb less. The memory is the peak of the
process beyond weights, gradients and moments. The matmul roofline is a median rate of square
float32 products in the same run: of jax alone, and the better one of jax and torch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # run as a script, the folder of the repository is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rpo_jax.config import Config, Data, Model, Train
from rpo_jax.model.shape import ModelShape, shape_to_hf
from tests.benchmarks.provenance import REPO, describe_run

PACKAGES = ("jax", "torch", "transformers", "trl")
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
LENGTHS = {  # prompt, chosen and rejected of each pair
    "rpo": [(512, 160, 128), (512, 144, 150)],
    "mixed": [(512, 160, 128), (96, 40, 30), (120, 30, 48), (80, 44, 40)],
}
EXPLANATION = 300
TEXT_ROWS, TEXT_LENGTH = 4, 512
WORDS = 151_643  # ids that occur
EOS = 0
SHARED = REPO.parent / "shared" / "data"
# How ours runs by default; each of them computes the same numbers.
SETTINGS = {
    "rpo": {"train": {"loss_chunk": 320, "keep_logits": True}, "model": {"remat": "dots"}},
    "exam": {"train": {"loss_chunk": 600, "keep_logits": True}, "model": {"remat": "dots"}},
    "cpt": {"train": {"loss_chunk": 128, "keep_logits": True}, "model": {"remat": "dots"}},
}


def make_pairs(workload: str) -> list[dict[str, np.ndarray]]:
    """Pairs of ids; responses end in end-of-text."""
    if workload == "exam":
        pairs = [read_exam_pair()]
    else:
        rng = np.random.default_rng(0)
        pairs = [[rng.integers(1, WORDS, n) for n in lengths] for lengths in LENGTHS[workload]]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    for _, chosen, rejected in pairs:
        chosen[-1] = rejected[-1] = EOS
    return [
        dict(zip(names, (np.asarray(ids, np.int32) for ids in pair), strict=True)) for pair in pairs
    ]


def read_exam_pair() -> list[list[int]]:
    """A 3-shot prompt of the exam, and two stretches of its text that are 300 tokens long."""
    from rpo_jax.data.tokenizer import read_tokenizer
    from rpo_jax.exams.igakuqa import read_demonstrations, read_questions
    from rpo_jax.exams.prompts import OFFICIAL_COMPLETION_V1

    exam = Path(os.environ.get("IGAKUQA_DIR", SHARED / "igakuqa"))
    json_file = os.environ.get("QWEN_TOKENIZER", SHARED / "qwen2.5-tokenizer" / "tokenizer.json")
    tokenizer = read_tokenizer(Path(json_file))
    questions = read_questions(exam, [2022])
    prompt = OFFICIAL_COMPLETION_V1.render(questions[0], read_demonstrations(exam))
    text = tokenizer.encode("\n".join(question.text for question in questions[1:30]))
    stretches = [text[at : at + EXPLANATION] for at in (0, EXPLANATION)]
    return [tokenizer.encode(prompt), *stretches]


def make_text() -> np.ndarray:
    """Full rows of random ids."""
    return np.random.default_rng(0).integers(1, WORDS, (TEXT_ROWS, TEXT_LENGTH)).astype(np.int32)


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


class Clock:
    """Seconds of what is between `start` and `stop`, by each of two clocks."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"clock": [], "processor": []}

    def start(self) -> None:
        self.began = self._read()

    def stop(self) -> None:
        for seconds, start, now in zip(
            self.seconds.values(), self.began, self._read(), strict=True
        ):
            seconds.append(now - start)

    def _read(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time() / (os.cpu_count() or 1)

    def after_first(self) -> dict[str, list[float]]:
        return {name: seconds[1:] for name, seconds in self.seconds.items()}


def measure_rate(multiply: Callable[[], Any], flops: float, tries: int = 9) -> dict[str, float]:
    """FLOP/s of a call by each clock, medians."""
    clock = Clock()
    for _ in range(tries + 1):
        clock.start()
        multiply()
        clock.stop()
    return {name: flops / statistics.median(s) for name, s in clock.after_first().items()}


def make_ours(workload: str, settings: dict[str, Any], shape: ModelShape = SHAPE) -> Any:
    """(work, batch) of a workload on one device; `settings` are sections of our config."""
    import jax

    from rpo_jax.config import Mesh
    from rpo_jax.model.qwen2 import make_network
    from rpo_jax.sharding.mesh import make_mesh
    from rpo_jax.training.workload import make_workload

    if workload == "cpt":
        tokens = make_text()
        records = [{"tokens": row, "segment_ids": np.ones_like(row)} for row in tokens]
        data = Data(row_length=TEXT_LENGTH)
    else:
        records = make_pairs(workload)
        sizes = {name: max(len(pair[name]) for pair in records) for name in records[0]}
        longest = max(sizes["chosen_ids"], sizes["rejected_ids"])
        data = Data(prompt_length=sizes["prompt_ids"], response_length=longest)
    config = Config(
        stage="cpt" if workload == "cpt" else "rpo",
        name="benchmark",
        init_from="itself",
        data=data,
        model=Model(attention="blocks"),
        train=Train(steps=100, batch_rows=len(records)),
    )
    for section, values in settings.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    network = make_network(shape, config.model, config.lora)
    work = make_workload(config, network, make_mesh(Mesh(), jax.devices()[:1]))
    places = work.arrange(records) if work.is_arranged else [[i] for i in range(len(records))]
    full = [work.make_row([records[i] for i in row]) for row in places if row]
    empty = {name: np.zeros_like(value) for name, value in full[0].items()}
    rows = iter(full)
    batch = [next(rows) if row else empty for row in places]
    return work, {name: np.stack([row[name] for row in batch]) for name in empty}


def run_ours(workload: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Our step, as `train` runs it."""
    import jax
    import jax.numpy as jnp

    from rpo_jax.training.evaluation import put_batch
    from rpo_jax.training.metrics import count_flops
    from rpo_jax.training.optim import make_optimizer
    from rpo_jax.training.state import abstract_state, make_params, split_params, start_from
    from rpo_jax.training.step import make_score, make_step

    matrix = jnp.ones((3000, 3000))
    product = jax.jit(jnp.matmul)
    rate = measure_rate(lambda: product(matrix, matrix).block_until_ready(), 2 * 3000**3)

    work, batch = make_ours(workload, settings)
    tx = make_optimizer(work.config.optim)
    abstract = abstract_state(work.network, tx, work.mesh)
    memory, clock = PeakMemory(), Clock()
    with jax.set_mesh(work.mesh):
        params = make_params(work.network, work.mesh, seed=0)
        trained, frozen = split_params(params)
        if work.config.rpo.has_reference and work.config.stage == "rpo":
            score = make_score(work, jax.eval_shape(lambda: params))
            batch["reference_logps"] = np.asarray(score(params, put_batch(batch, work.mesh)))
        state = start_from(trained, tx, abstract)
        placed = put_batch(batch, work.mesh)
        step = make_step(work, tx, abstract).lower(state, frozen, work.hyper, placed).compile()
        memory.start()
        for _ in range(steps + 1):
            clock.start()
            state, metrics = step(state, frozen, work.hyper, placed)
            jax.block_until_ready((state, metrics))
            clock.stop()
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    return {
        "seconds": clock.after_first(),
        "extra_bytes": memory.peak - memory.before - gradients,
        "planned_bytes": step.memory_analysis().temp_size_in_bytes - gradients,
        "flops": count_flops(work.network, batch),
        "matmul_flops_per_s": rate,
        "loss": float(metrics["loss"]),
    }


def start_torch() -> tuple[Any, float]:
    """A random model in torch, and the rate of its products."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    matrix = torch.ones((3000, 3000))
    rate = measure_rate(lambda: matrix @ matrix, 2 * 3000**3)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape_to_hf(SHAPE))), rate


def run_transformers(steps: int) -> dict[str, Any]:
    """transformers' language modelling loss, and torch's AdamW."""
    import torch

    model, rate = start_torch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.tensor(make_text()).long()
    memory, clock = PeakMemory(), Clock()
    memory.start()
    for _ in range(steps + 1):
        clock.start()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.stop()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "seconds": clock.after_first(),
        "extra_bytes": memory.peak - memory.before - 3 * weights,  # gradients and two moments
        "matmul_flops_per_s": rate,
        "loss": loss.item(),
    }


def run_trl(workload: str, steps: int) -> dict[str, Any]:
    """TRL's trainer, as its `train` runs it, without gradient checkpointing."""
    import datasets
    import transformers
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers

    model, rate = start_torch()
    words = {"<eos>": EOS} | {f"t{i}": i for i in range(1, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("prompt", "chosen", "rejected")
    rows = [
        {name: "".join(f" t{i}" for i in pair[f"{name}_ids"] if i != EOS) for name in names}
        for pair in make_pairs(workload)
    ]
    memory, clock = PeakMemory(), Clock()

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            memory.start()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(
                output_dir=folder,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, 1.0],
                precompute_ref_log_probs=True,
                per_device_train_batch_size=len(rows),
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
            callbacks=[Steps()],
        )
        loss = trainer.train().training_loss
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return {
        "seconds": clock.after_first(),
        "extra_bytes": memory.peak - memory.before - 3 * weights,  # gradients and two moments
        "matmul_flops_per_s": rate,
        "loss": loss,
    }


def run_side(side: str, workload: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One side in a fresh process."""
    command = [sys.executable, __file__, f"--side={side}", f"--workload={workload}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, f"--steps={steps}", f"--settings={json.dumps(settings)}"],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(workload: str, steps: int, rounds: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Both sides in turns; medians, their ratio, and the distance from the limits."""
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for side, found in sides.items():
            found.append(run_side(side, workload, steps, settings))
    extra = {side: max(run["extra_bytes"] for run in found) for side, found in sides.items()}
    result = {
        "extra_gib": {side: size / 2**30 for side, size in extra.items()},
        "extra_share_of_peer": extra["ours"] / extra["peer"],
    }
    for clock in ("clock", "processor"):
        seconds = {
            side: statistics.median(s for run in found for s in run["seconds"][clock])
            for side, found in sides.items()
        }
        rates = {
            side: statistics.median(run["matmul_flops_per_s"][clock] for run in found)
            for side, found in sides.items()
        }
        rate = sides["ours"][0]["flops"] / seconds["ours"]
        result[f"by_{clock}"] = {
            "seconds_a_step": seconds,
            "times_peer": seconds["peer"] / seconds["ours"],
            "gflops_per_s": rate / 1e9,
            "matmul_gflops_per_s": {"jax": rates["ours"] / 1e9, "torch": rates["peer"] / 1e9},
            "share_of_matmul": {"jax": rate / rates["ours"], "best": rate / max(rates.values())},
        }
    return {
        **result,
        "settings": settings,
        "runs": sides,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workload", choices=("mixed", *SETTINGS), nargs="+", default=list(SETTINGS)
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turns")
    parser.add_argument("--settings", type=json.loads, default={}, help="of our config, as JSON")
    parser.add_argument("--out", type=Path, help="where the figures go, beside the terminal")
    parser.add_argument("--side", choices=("ours", "peer"), help="run one side and print its JSON")
    args = parser.parse_args()
    if args.side:
        (workload,) = args.workload
        if args.side == "ours":
            found = run_ours(workload, args.steps, args.settings)
        elif workload == "cpt":
            found = run_transformers(args.steps)
        else:
            found = run_trl(workload, args.steps)
        print(json.dumps(found))
        return
    result = {}
    if args.out and args.out.exists():  # the others of its workloads stay
        result = json.loads(args.out.read_text())
    for workload in args.workload:
        settings = SETTINGS[workload] | args.settings
        found = compare(workload, args.steps, args.rounds, settings)
        result[workload] = describe_run(*PACKAGES) | {"seeds": [0]} | found
        print(json.dumps({workload: found}, indent=2))
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
