"""Runs stages one after the other: `python -m rpo_jax.study`, by default on the embedded world."""

import argparse
import logging
import sys
import time
from typing import Any

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.train import build, format_summary, train

STAGES = ("configs/fictional_base.py", "configs/fictional_cpt.py", "configs/fictional_rpo.py")


def main(argv: list[str]) -> None:
    """Trains stage after stage, each from the one before, and shows what each one changed."""
    parser = argparse.ArgumentParser(prog="python -m rpo_jax.study", description=main.__doc__)
    parser.add_argument(
        "stages", nargs="*", default=STAGES, metavar="CONFIG.py", help="default: %(default)s"
    )
    parser.epilog = (
        "--config.field=value overrides a field in every stage; finished stages are kept"
    )
    args, overrides = parser.parse_known_args(argv)
    configs = [cli.load_config(path, overrides) for path in args.stages]
    summaries = []
    for number, config in enumerate(configs, start=1):
        logging.info("\n== stage %d of %d: %s", number, len(configs), config.name)
        started = time.perf_counter()
        summaries.append(train(build(config)))
        logging.info("\n%s\n%.0f s", format_summary(summaries[-1]), time.perf_counter() - started)
    print(format_study(configs, summaries))


def format_study(configs: list[Config], summaries: list[dict[str, Any]]) -> str:
    """One table of all stages: the held-out measures a reader asks for, before and after each."""
    shown = {
        "nll": "held-out nats/token",
        "preference_accuracy": "preference accuracy",
        "reward_accuracy": "reward accuracy",
        "margin": "margin, nats",
    }
    lines = ["", f"{'stage':<18}{'held out':<24}{'before':>10}{'after':>10}"]
    for config, summary in zip(configs, summaries, strict=True):
        before, after = summary["heldout"]["before"], summary["heldout"]["after"]
        for name, text in shown.items():
            if name in after:
                text = "chosen nats/token" if (name, config.stage) == ("nll", "rpo") else text
                lines.append(
                    f"{config.name:<18}{text:<24}{before[name]:>10.4f}{after[name]:>10.4f}"
                )
    paths = [f"{summary['name']:<18}{summary['paths']['run']}" for summary in summaries]
    return "\n".join([*lines, "", *paths])


if __name__ == "__main__":
    with cli.exit_on_error():
        main(sys.argv[1:])
