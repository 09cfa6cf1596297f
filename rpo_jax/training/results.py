"""What came of a sweep's points: one table, averaged over seeds, with intervals."""

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from rpo_jax.config import MODES, Config
from rpo_jax.writing import write_json, write_whole

Row = dict[str, Any]
# What a reader asks for first, where a stage measures it.
MEASURES = ("preference_accuracy", "reward_accuracy", "margin", "chosen_log_ratio", "nll", "loss")


@dataclass(frozen=True)
class Point:
    """One point of a sweep: what it overrides, by dotted names, and the config that comes of it."""

    overrides: Mapping[str, Any]
    config: Config


@dataclass(frozen=True)
class Mean:
    """A mean over `count` seeds, and half of its 95 % interval by Student's t; nan for one seed."""

    value: float
    half: float
    count: int

    def to_dict(self) -> dict[str, float | None]:
        """Ready for JSON, which has no nan."""
        half = None if self.count == 1 else self.half
        return {"value": self.value, "half": half, "count": self.count}

    def __str__(self) -> str:
        """As in 0.8125 ± 0.0312."""
        return f"{self.value:.4f}" + (f" ± {self.half:.4f}" if self.count > 1 else "")


def collect(points: Sequence[Point]) -> list[Row]:
    """A row for each finished point: name, overrides, tokens read, held-out measures."""
    rows = []
    for point in points:
        path = point.config.folder / "summary.json"
        if not path.is_file():
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        heldout, tokens = summary["heldout"], summary["trained_on"]["tokens"]
        before = {f"{name}_before": value for name, value in heldout["before"].items()}
        head = {"name": point.config.name, **point.overrides, "tokens": tokens}
        rows.append({**head, **heldout["after"], **before})
    return rows


def list_axes(points: Sequence[Point]) -> list[str]:
    """The overridden fields, in the order of the sweep; not `seed`, which is averaged over."""
    return [name for name in points[0].overrides if name != "seed"]


def average(rows: Sequence[Row], axes: Sequence[str], measure: str) -> dict[tuple[Any, ...], Mean]:
    """The mean of a measure over seeds, by the values of the axes, in order of appearance.

    Rows that have not got the measure, as those of a loss without a reference, are not in it.
    """
    return {
        key: estimate_mean([row[measure] for row in own])
        for key, own in group([row for row in rows if measure in row], axes).items()
    }


def group(rows: Sequence[Row], axes: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by their values of the axes, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[axis] for axis in axes)].append(row)
    return dict(groups)


def list_measures(rows: Sequence[Row]) -> list[str]:
    """Of `MEASURES`, what any of the rows has."""
    return [name for name in MEASURES if any(name in row for row in rows)]


def estimate_mean(values: Sequence[float]) -> Mean:
    """The mean of independent values, with Student's interval."""
    count, value = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Mean(value, math.nan, 1)
    spread = math.sqrt(math.fsum((x - value) ** 2 for x in values) / (count - 1) / count)
    return Mean(value, float(stats.t.ppf(0.975, count - 1)) * spread, count)


def write_results(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes results.json and results.csv, a row a point."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", list(rows))
    return [folder / "results.json", write_table(folder / "results.csv", rows)]


def write_table(path: Path, rows: Sequence[Row]) -> Path:
    """Writes rows as CSV, with a column for each name that any of them has."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
    return path


def warn_of_guessing(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """What is to be said where no arm is above guessing; "" where one is."""
    if any(found[mode]["low"] > found["guessing"] for found in compared.values() for mode in MODES):
        return ""
    return "no arm is above guessing in either way: nothing follows about explaining"
