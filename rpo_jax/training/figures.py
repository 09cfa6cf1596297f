"""Figures of sweeps and studies: heat maps, curves, log-ratios over training, arms side by side."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rpo_jax.training.measures import explain_measure
from rpo_jax.training.results import Mean, Point, Row, average, list_measures, warn_of_guessing
from rpo_jax.training.run import read_metrics
from rpo_jax.writing import open_whole

_SIZE = (4.6, 3.8)  # of a panel, inches
_WINDOW = 9  # steps that a training curve is averaged over


def draw_maps(path: Path, rows: Sequence[Row], axes: Sequence[str]) -> Path:
    """A heat map for each measure over two axes, averaged over seeds."""
    first, second = axes
    shown = list_measures(rows)
    figure, panels = _panels(len(shown))
    for panel, name in zip(panels, shown, strict=True):
        means = average(rows, (first, second), name)
        across = sorted({key[0] for key in means})
        up = sorted({key[1] for key in means})
        grid = np.full((len(up), len(across)), np.nan)
        for (x, y), mean in means.items():
            grid[up.index(y), across.index(x)] = mean.value
        image = panel.imshow(grid, origin="lower", aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=panel)
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (x, y), mean in means.items():
            ink = "black" if mean.value > middle else "white"
            place = across.index(x), up.index(y)
            panel.text(*place, _label(mean), ha="center", va="center", color=ink, fontsize=8)
        panel.set_xticks(range(len(across)), [f"{x:g}" for x in across])
        panel.set_yticks(range(len(up)), [f"{y:g}" for y in up])
        _name(panel, first, second, _with_unit(name))
    return _save(figure, path)


def draw_curves(path: Path, rows: Sequence[Row], axes: Sequence[str]) -> Path:
    """Each measure over an axis, a line a value of a second one, with intervals over seeds."""
    first, *others = axes
    shown = list_measures(rows)
    figure, panels = _panels(len(shown))
    for panel, name in zip(panels, shown, strict=True):
        lines: dict[Any, list[tuple[float, Mean]]] = defaultdict(list)
        for (x, *line), mean in average(rows, (first, *others), name).items():
            lines[tuple(line)].append((x, mean))
        for line, points in sorted(lines.items()):
            points.sort(key=lambda point: point[0])
            x, y = [x for x, _ in points], [mean.value for _, mean in points]
            halves = [mean.half for _, mean in points]  # nan: one seed, no interval
            bars = None if all(map(math.isnan, halves)) else halves
            text = f"{_short(others[0])} {line[0]:g}" if others else None
            panel.errorbar(x, y, yerr=bars, label=text, marker="o", markersize=4, capsize=3)
        _name(panel, first, _with_unit(name), "")
        if others:
            panel.legend(fontsize=8)
    return _save(figure, path)


def draw_log_ratios(path: Path, points: Sequence[Point], axis: str) -> Path | None:
    """Chosen and rejected log-ratio of training batches, a panel for each value of an axis.

    Faint lines are points; the bold one is their mean. None where the stage has no log-ratios.
    """
    curves: dict[Any, list[dict[str, np.ndarray]]] = defaultdict(list)
    for point in points:
        lines = [line for line in read_metrics(point.config.folder) if "chosen_log_ratio" in line]
        if lines:
            names = ("step", "chosen_log_ratio", "rejected_log_ratio")
            curve = {name: np.array([line[name] for line in lines]) for name in names}
            curves[point.overrides[axis]].append(curve)
    if not curves:
        return None
    figure, panels = _panels(len(curves), share=True)
    for panel, (value, found) in zip(panels, sorted(curves.items()), strict=True):
        for side, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
            smooth = [_smooth(curve[f"{side}_log_ratio"]) for curve in found]
            steps = [curve["step"] for curve in found]
            for x, y in zip(steps, smooth, strict=True):
                panel.plot(x, y, color=color, alpha=0.2, linewidth=0.8)
            length = min(map(len, smooth))
            mean = np.mean([y[:length] for y in smooth], axis=0)
            panel.plot(steps[0][:length], mean, color=color, label=side)
        panel.axhline(0.0, color="gray", linewidth=0.8)
        title = value if isinstance(value, str) else f"{_short(axis)} {value:g}"
        _name(panel, "step", "", title)
        panel.legend(fontsize=8)
    figure.supylabel(f"log-ratio to the reference, nats (mean of {_WINDOW} steps)", fontsize=10)
    return _save(figure, path)


def draw_arms(path: Path, compared: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]) -> Path:
    """Accuracy of each arm by way of asking, and what explaining first changes.

    Bars and marks have their 95 % intervals over questions; points are single runs. A dashed line
    is what guessing gets right; where no arm gets above it, the figure says so.

    Args:
        path: of the figure.
        compared: by arm, estimates `{value, low, high}` of each measure.
        rows: a row a run, with its arm and the same measures.
    """
    figure, (left, right) = _panels(2)
    modes = (("answer_only", "tab:blue", -0.2), ("explain_first", "tab:orange", 0.2))
    for place, (arm, found) in enumerate(compared.items()):
        own = [row for row in rows if row["arm"] == arm]
        for mode, color, shift in modes:
            _mark(left, place + shift, found[mode], [row[mode] for row in own], color)
            text = None if place else _short(mode)
            height = 100 * found[mode]["value"]
            left.bar(place + shift, height, 0.36, color=color, alpha=0.5, label=text)
        _mark(right, place, found["difference"], [row["difference"] for row in own], "tab:purple")
    right.axhline(0.0, color="gray", linewidth=0.8)
    guessing = 100 * next(iter(compared.values()))["guessing"]
    left.axhline(guessing, color="gray", linewidth=0.8, linestyle="--", label="guessing")
    for panel, title in (
        (left, "right answers, % (with 95 % over questions; dots: runs)"),
        (right, "explaining first less answering only, points of 100"),
    ):
        panel.set_xticks(range(len(compared)), list(compared), rotation=30, ha="right")
        panel.set_title(title, fontsize=10)
    figure.legend(loc="outside lower left", ncols=3, fontsize=8)
    if warning := warn_of_guessing(compared):
        figure.suptitle(warning, fontsize=10, color="tab:red")
    return _save(figure, path)


def _mark(
    panel: Axes, x: float, estimate: Mapping[str, float], runs: Sequence[float], color: str
) -> None:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    bars = [[value - low], [high - value]]
    # A mark at 0 is seen whole.
    panel.errorbar(x, value, bars, color=color, fmt="o", capsize=4, clip_on=False)
    if len(runs) > 1:
        panel.plot([x + 0.1] * len(runs), [100 * run for run in runs], "k.", markersize=4)


def _panels(count: int, share: bool = False) -> tuple[Figure, list[Axes]]:
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=share).ravel().tolist()
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _name(panel: Axes, x: str, y: str, title: str) -> None:
    panel.set_xlabel(_short(x))
    panel.set_ylabel(_short(y))
    panel.set_title(title.replace("_", " "), fontsize=10)


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1].replace("_", " ")


def _with_unit(name: str) -> str:
    return f"{name}, {re.split(r' ?[:;,(]', explain_measure(name))[0]}"


def _label(mean: Mean) -> str:
    return f"{mean.value:.3g}" + (f"\n±{mean.half:.2g}" if mean.count > 1 else "")


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over the steps until then."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - _WINDOW, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _save(figure: Figure, path: Path) -> Path:
    with open_whole(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)
    return path
