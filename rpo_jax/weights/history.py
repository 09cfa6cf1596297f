"""How a model came about, as its runs tell: the words of a model card on method, data, results."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo_jax.config import Config, resolve
from rpo_jax.errors import UserError


@dataclass(frozen=True)
class History:
    """Markdown; empty where nothing is known."""

    method: str = ""
    data: str = ""
    results: str = ""


def tell_history(folder: Path, step: int) -> History:
    """Tells a run and the runs it began with, the first one first.

    Args:
        folder: a model folder; an import has no history.
        step: of its checkpoint; measures are told if they are of that step.
    """
    runs = list(_follow(folder))[::-1]
    method = "\n".join(_describe_method(config) for _, config, _ in runs)
    if runs:
        of = runs[-1][1].train.steps
        method += "\n\nMade with rpo_jax, a re-implementation of arXiv:2504.18080 in JAX."
        method += "" if step == of else f" These weights are of step {step} of {of}."
    return History(
        method=method,
        data="\n".join(_describe_data(*run) for run in runs),
        results="\n\n".join(filter(None, (_tell_heldout(folder, step), _tell_exams(folder, step)))),
    )


def _follow(folder: Path) -> Iterator[tuple[Path, Config, dict[str, str]]]:
    """Folder, config and fingerprints of the data of a run, then of the one before it."""
    seen = set()
    while (folder / "run.json").is_file() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        run = _read(folder / "run.json")
        try:
            config = resolve(run["config"])
        except (UserError, KeyError, TypeError) as error:
            logging.warning("%s/run.json: not told in the card (%s)", folder, error)
            return
        yield folder, config, run.get("data", {})
        if config.origin is None:
            return
        folder = config.origin


def _describe_method(config: Config) -> str:
    optim, train = config.optim, config.train
    if config.stage == "rpo":
        rpo = config.rpo
        what = f"preference pairs: {rpo.preference}, beta {rpo.beta:g}, plus {rpo.alpha:g} x NLL"
        row = f"{config.data.prompt_length} + 2 x {config.data.response_length} tokens"
    else:
        what, row = "next-token loss on text", f"{config.data.row_length} tokens"
    if config.lora.rank:
        held = f" over {config.lora.quantize} weights" if config.lora.quantize else ""
        trained = f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}{held}"
    else:
        trained = "all weights"
    rate = "" if optim.learning_rate is None else f"{optim.learning_rate:g}, "
    return (
        f"- **{config.stage.upper()}** (`{config.name}`), {what}. {train.steps} steps of "
        f"{train.batch_rows} rows of {row}; {trained}; AdamW, learning rate {rate}"
        f"{optim.schedule}; {config.model.param_dtype} weights, seed {config.seed}."
    )


def _describe_data(folder: Path, config: Config, fingerprints: dict[str, str]) -> str:
    data = config.data
    if data.source == "files":
        what = _name_files(data.train)
    elif data.source == "candidates":
        what = _describe_candidates(config)
    elif config.stage == "cpt" and data.source == "fictional":
        text = data.fictional.text.replace("both", "general and textbook")
        what = f"{_name_exam(config, data.source)}, its {text} passages"
    else:
        what = _name_exam(config, data.source)
    mark = fingerprints.get("the training data", "unknown")
    if config.stage == "rpo":
        for name, how in (("training", "pairs trained on"), ("held-out", "held out")):
            count = _count_pairs(folder, fingerprints.get(f"the {name} data", ""))
            what += f", {how}: {count}" if count else ""
    return f"- **{config.stage.upper()}** (`{config.name}`): {what}; fingerprint {mark[:16]}."


def _describe_candidates(config: Config) -> str:
    sample, pair = config.data.sample, config.data.pair
    drawn = f"{sample.answers} a question and mode drawn from the model it began with"
    answers = [drawn] if sample.answers else []
    answers += [f"those in {_name_files(sample.files)}"] if sample.files else []
    truth = f" with explanations of {_name_files(pair.explanations)}" if pair.explanations else ""
    return (
        f"pairs by {pair.strategy} of answers to {_name_exam(config, sample.exam)} "
        f"({' and '.join(answers)}){truth}"
    )


def _name_exam(config: Config, name: str) -> str:
    data = config.data
    if name == "fictional":
        return f"the fictional world {data.fictional.seed} ({data.fictional.size})"
    years = ", ".join(map(str, data.igakuqa.train_years))
    return f"IgakuQA {years} (arXiv:2303.18027)" if name == "igakuqa" else f"{name} {years}"


def _name_files(patterns: tuple[str, ...]) -> str:
    """Names alone: a release does not tell where its files lay."""
    return ", ".join(Path(pattern).name for pattern in patterns)


def _count_pairs(folder: Path, fingerprint: str) -> int:
    """How many there are in the records of a run; 0 if these are not there any more."""
    path = folder.parent / "data" / f"pairs-{fingerprint[:16]}" / "dataset.json"
    return _read(path).get("records", 0) if path.is_file() else 0


def _tell_heldout(folder: Path, step: int) -> str:
    path = folder / "summary.json"
    if not path.is_file() or (summary := _read(path)).get("steps") != step:
        return ""
    before, after = (summary["heldout"][when] for when in ("before", "after"))
    lines = ["| held out | before the last stage | after |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {name} | {before[name]:.4f} | {value:.4f} |" for name, value in after.items()]
    )


def _tell_exams(folder: Path, step: int) -> str:
    lines = []
    for path in sorted((folder / "exams").glob("*/report.json")):
        report = _read(path)
        for model in report["models"]:
            if model["settings"].get("step") != step:
                continue
            for mode, held in model["modes"].items():
                marks = " | ".join(
                    f"{held['points'][mark]['mean']:g}" for mark in ("official", "extracted")
                )
                total = report["questions"]["points"]
                lines.append(f"| {report['title']}: {mode} | {marks} | {total} |")
    if not lines:
        return ""
    return "\n".join(
        ["| exam | official points | extracted points | of |", "|---|---|---|---|", *lines]
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is wanted, not {type(values).__name__}")
    return values
