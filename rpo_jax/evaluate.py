"""Measures a run on held-out data: `python -m rpo_jax.evaluate --config configs/<name>.py`."""

import json
from typing import Any

import jax

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.data.records import open_records
from rpo_jax.data.tokenizer import read_tokenizer
from rpo_jax.prepare import prepare
from rpo_jax.train import build
from rpo_jax.training.checkpoint import load_params
from rpo_jax.training.evaluation import find_references, make_evaluate
from rpo_jax.training.run import check_same_run, check_vocabulary, write_json
from rpo_jax.training.state import abstract_weights
from rpo_jax.training.workload import Workload


def main(config: Config, json_line: bool = False) -> None:
    """Measures a run's newest checkpoint: nats/token of text, or accuracy and margins of pairs."""
    result = evaluate(build(config))
    print(json.dumps(result) if json_line else format_result(result))


def evaluate(work: Workload) -> dict[str, Any]:
    """Held-out means of the newest checkpoint of a run; also written to its evaluation.json.

    Raises:
        UserError: the run has no checkpoint, or is of another config.
    """
    config = work.config
    check_same_run(config, free=("workdir", "data.", "train.", "mesh.", "log.", "checkpoint."))
    tokenizer = read_tokenizer(config.folder / "model", config.tokenizer.end_of_text)
    check_vocabulary(config, tokenizer, work.network.shape)
    heldout = open_records(prepare(config, tokenizer).heldout)
    with jax.set_mesh(work.mesh):
        abstract = abstract_weights(work.network, work.mesh)
        step, params = load_params(config.folder, abstract)
        (reference,) = find_references(work, config.folder, [heldout], step, params)
        means = make_evaluate(work, abstract, heldout, reference)(params)
    result = {"run": str(config.folder), "step": step, "heldout": means}
    if jax.process_index() == 0:
        write_json(config.folder / "evaluation.json", result)
    return result


def format_result(result: dict[str, Any]) -> str:
    """The result as a table for the terminal."""
    lines = [f"{result['run']}, step {result['step']}, held out:"]
    lines += [f"  {name:<22}{value:>12.4f}" for name, value in result["heldout"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, json_line="print one line of JSON instead of a table")
