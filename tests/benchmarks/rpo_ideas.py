"""What each idea of the step brings: time and memory with it and without it, all else the same.

    python tests/benchmarks/rpo_ideas.py --out tests/benchmarks/rpo_ideas.json

The model and the clocks are those of `rpo_trl.py`, each measurement in a process of its own. The
pairs are its two, or for packing and row lengths one of them with three short ones. Memory is what
the compiler plans beyond weights, gradients and moments. `vocabulary` is the loss alone, one row of
512 states of width 512 and 152064 vocabulary rows: the same plan with all logits at once, in chunks
of 64, and in chunks with a head that is not trained.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.provenance import describe_run
from tests.benchmarks.rpo_trl import PACKAGES, run_side

KEPT = {"train": {"loss_chunk": 320, "keep_logits": True}}
ONE_BY_ONE = {"train": {"loss_chunk": 320, "keep_logits": True, "micro_batches": 4}}
ADAPTERS = KEPT | {"lora": {"rank": 16}}
# idea -> workload, settings without it, settings with it
IDEAS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "responses alone are projected": (
        "rpo",
        {"train": {"loss_chunk": 1000, "keep_logits": True}}
        | {"rpo": {"nll_tokens": "prompt+completion"}},
        KEPT,
    ),
    "prefix sharing": ("rpo", KEPT | {"rpo": {"share_prefix": False}}, KEPT),
    "attention in blocks": ("rpo", KEPT | {"model": {"attention": "dense"}}, KEPT),
    "chunks, computed again": ("rpo", KEPT, {"train": {"loss_chunk": 80}}),
    "packing": ("mixed", ONE_BY_ONE, ONE_BY_ONE | {"data": {"pairs_per_row": 3}}),
    "row lengths": ("mixed", ONE_BY_ONE, ONE_BY_ONE | {"data": {"row_sizes": 4}}),
    "frozen head": ("rpo", ADAPTERS | {"lora": {"rank": 16, "trained_tokens": ("t",)}}, ADAPTERS),
}


def measure(workload: str, steps: int, settings: dict[str, Any]) -> dict[str, float]:
    found = run_side("ours", workload, steps, settings)
    return {
        "processor_seconds_a_step": statistics.median(found["seconds"]["processor"]),
        "planned_gib": found["planned_bytes"] / 2**30,
    }


def plan_loss(vocabulary: int = 152064, width: int = 512, length: int = 512) -> dict[str, float]:
    """GiB that the compiler plans for a gradient of the loss, beyond arguments and results."""
    import jax
    import jax.numpy as jnp

    from rpo_jax.losses.token_logps import Projection, token_logps

    def naive(hidden: Any, head: Any, labels: Any) -> Any:
        logps = jax.nn.log_softmax(jnp.einsum("bmd,vd->bmv", hidden, head))
        return jnp.take_along_axis(logps, labels[..., None], axis=-1)

    def chunked(*args: Any) -> Any:
        return token_logps(*args, Projection(64))

    def plan(logps: Any, trained: Any) -> float:
        hidden = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
        head = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
        labels = jax.ShapeDtypeStruct((1, length), jnp.int32)
        gradient = jax.jit(jax.grad(lambda *args: logps(*args).sum(), trained))
        compiled = gradient.lower(hidden, head, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**30

    return {
        "naive": plan(naive, (0, 1)),
        "chunked": plan(chunked, (0, 1)),
        "chunked, frozen head": plan(chunked, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="measured steps a process")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go")
    args = parser.parse_args()
    head = describe_run(*PACKAGES)
    result = head | {"seeds": [0], "vocabulary_planned_gib": plan_loss(), "ideas": {}}
    for name, (workload, without, with_it) in IDEAS.items():
        result["ideas"][name] = {
            "without": measure(workload, args.steps, without),
            "with": measure(workload, args.steps, with_it),
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        print(name, result["ideas"][name], flush=True)


if __name__ == "__main__":
    main()
