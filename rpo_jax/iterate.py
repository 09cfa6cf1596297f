"""Iterative RPO: `python -m rpo_jax.iterate --config configs/<name>.py`.

Each round draws answers from the model of the round before, makes pairs of them and trains on
these, with that model as the reference. A round is a run of its own, <name>-1, <name>-2, ...;
whatever of it is finished is not done again. Source: arXiv:2404.19733.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.exams.candidates import CANDIDATES_NOTE
from rpo_jax.exams.split import split_exam
from rpo_jax.pair import PAIRS_NOTE, make_pairs
from rpo_jax.pair import describe as describe_pairs
from rpo_jax.sample import describe as describe_answers
from rpo_jax.sample import draw, gather
from rpo_jax.train import build, format_summary, train
from rpo_jax.training.compile_once import compile_once
from rpo_jax.training.measures import explain_measure
from rpo_jax.writing import write_json


@compile_once()
def main(config: Config) -> None:
    """Runs rounds of sampling, pairing and training, each from what the one before trained."""
    results = []
    for number, config_of_round in enumerate(list_rounds(config), start=1):
        logging.info("\n== round %d of %d: %s", number, config.rounds.count, config_of_round.name)
        results.append(run_round(config_of_round))
        if jax.process_index() == 0:
            config.folder.mkdir(parents=True, exist_ok=True)
            write_json(config.folder / "rounds.json", results)
    print(format_rounds(results))


def list_rounds(config: Config) -> Iterator[Config]:
    """The run of each round; the first starts from `init_from`, each other from the one before."""
    temperatures = config.rounds.temperatures or (config.data.sample.temperature,)
    for place in range(config.rounds.count):
        temperature = temperatures[min(place, len(temperatures) - 1)]
        sample = replace(config.data.sample, temperature=temperature)
        yield replace(
            config,
            name=f"{config.name}-{place + 1}",
            init_from=f"{config.name}-{place}" if place else config.init_from,
            data=replace(config.data, sample=sample),
        )


def run_round(config: Config) -> dict[str, Any]:
    """Samples, pairs and trains; what came of each."""
    split = split_exam(config)
    draw(config, split)
    answers = gather(config, split)
    logging.info("%s", describe_answers(answers))
    pairs = make_pairs(config)
    logging.info("%s", describe_pairs(pairs))
    summary = train(build(config))
    logging.info("\n%s", format_summary(summary))
    read = {"answers": answers / CANDIDATES_NOTE, "pairs": pairs / PAIRS_NOTE}
    return {
        "run": config.name,
        "from": config.init_from,
        "temperature": config.data.sample.temperature,
        **{name: json.loads(path.read_text())["summary"] for name, path in read.items()},
        "heldout": summary["heldout"],
    }


def format_rounds(results: list[dict[str, Any]]) -> str:
    """One table: what each round's first model answered, and what training changed."""
    lines = [
        "",
        f"{'round':<24}{'mode':<15}{'right':>8}{'pairs':>8}{'held-out accuracy':>22}{'margin':>18}",
    ]
    for result in results:
        before, after = result["heldout"]["before"], result["heldout"]["after"]
        for mode, answers in result["answers"].items():
            lines.append(
                f"{result['run']:<24}{mode:<15}{answers['right']:>8.1%}"
                f"{result['pairs']['train']['modes'].get(mode, 0):>8,}"
                f"{_say_change(before, after, 'preference_accuracy', 4):>22}"
                f"{_say_change(before, after, 'margin', 3):>18}"
            )
    lines += [
        "",
        "right: share of the answers drawn in this round; pairs: made of them, trained on",
        f"held-out accuracy: {explain_measure('preference_accuracy')}",
        f"margin: {explain_measure('margin')}; both before -> after the round's training",
    ]
    return "\n".join(lines)


def _say_change(
    before: Mapping[str, float], after: Mapping[str, float], name: str, digits: int
) -> str:
    """As in 0.512 -> 0.731; a loss without a reference has no margin."""
    if name not in after:
        return "-"
    return f"{before[name]:.{digits}f} -> {after[name]:.{digits}f}"


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "--config configs/fictional_rounds.py",
            "--config configs/fictional_rounds.py --config.rounds.count=3",
        ),
    )
