"""A report as one web page: no script, nothing loaded from elsewhere, for light and dark."""

from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

_WIDTH, _LEFT, _RIGHT, _ROW = 760, 250, 110, 26  # of a plot, its labels, its values, a row
_NAMES = {"answer_only": "answer only", "explain_first": "explain first"}


def render_page(report: dict[str, Any]) -> str:
    """The page of a report as `exams.report` builds it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rpo_jax.exams", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "signed": _signed,
        "mode": _NAMES.__getitem__,
    }
    template = environment.get_template("report.html.jinja")
    return template.render(
        report=report,
        points=_draw_points(report),
        differences=_draw_differences(report),
        flips=[_draw_flips(model) for model in report["models"]],
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _signed(number: float) -> str:
    return f"{number:+.1f}".replace("-", "−")


def _draw_points(report: dict[str, Any]) -> Markup:
    """Points of every model in every mode, with the spread over seeds; published ones beside."""
    total = report["questions"]["points"] or 1
    bars = []
    for model in report["models"]:
        for mode, found in model["modes"].items():
            points = found["points"]["extracted"]
            bars.append(
                (f"{model['name']}, {_NAMES[mode]}", points["mean"], mode, points["values"])
            )
    for name, found in report["published"].items():
        bars.append((f"{name} (published)", found["points"], "published", []))
    scale = (_WIDTH - _LEFT - _RIGHT) / total
    parts = []
    for row, (label, points, kind, seeds) in enumerate(bars):
        y = row * _ROW
        parts += [_label(label, y), _bar(_LEFT, y, points * scale, kind)]
        parts += [
            f'<circle class="seed" cx="{_LEFT + seed * scale:.1f}" cy="{y + 13}" r="2.5"/>'
            for seed in (seeds if len(seeds) > 1 else [])
        ]
        end = _LEFT + max([points, *seeds]) * scale + 8
        parts.append(_value(end, y, f"{points:g} ({points / total:.1%})"))
    return _svg(parts, len(bars), f"Points of {total}")


def _draw_differences(report: dict[str, Any]) -> Markup:
    """Explain first less answer only, in points, with the bootstrap interval, a row a model."""
    rows = [
        (model["name"], model["comparison"]["points"])
        for model in report["models"]
        if model["comparison"]
    ]
    if not rows:
        return Markup()
    reach = max(max(abs(found["low"]), abs(found["high"]), 1.0) for _, found in rows) * 1.1
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    scale = (_WIDTH - _LEFT - _RIGHT) / 2 / reach
    bottom = len(rows) * _ROW
    parts = [_line("axis", middle, 0, middle, bottom), _value(middle, bottom - 2, "0", "middle")]
    for row, (name, found) in enumerate(rows):
        y = row * _ROW
        low, high, at = (middle + found[k] * scale for k in ("low", "high", "difference"))
        kind = "explain_first" if found["difference"] >= 0 else "lost"
        parts += [
            _label(name, y),
            _line(f"interval {kind}", low, y + 13, high, y + 13),
            f'<circle class="{kind}" cx="{at:.1f}" cy="{y + 13}" r="5"/>',
            _value(_WIDTH - _RIGHT + 10, y, _signed(found["difference"])),
        ]
    return _svg(parts, len(rows) + 1, "Explain first less answer only, in points")


def _draw_flips(model: dict[str, Any]) -> Markup:
    """What explaining lost (left) and gained (right), by category, in questions."""
    if not model["comparison"]:
        return Markup()
    flips = model["comparison"]["flips"]["category"]
    changed = {name: f for name, f in flips.items() if f["lost"] or f["gained"]}
    if not changed:
        return Markup()
    ordered = sorted(changed.items(), key=lambda item: item[1]["gained"] - item[1]["lost"])
    reach = max(max(f["lost"], f["gained"]) for f in changed.values())
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    scale = (_WIDTH - _LEFT - _RIGHT - 60) / 2 / reach
    parts = [_line("axis", middle, 0, middle, len(ordered) * _ROW)]
    for row, (name, found) in enumerate(ordered):
        y = row * _ROW
        lost, gained = found["lost"] * scale, found["gained"] * scale
        parts += [_label(f"{name} ({found['questions']})", y), _bar(middle - lost, y, lost, "lost")]
        parts += [_bar(middle, y, gained, "explain_first")]
        if found["lost"]:
            parts.append(_value(middle - lost - 6, y, f"{found['lost']:g}", anchor="end"))
        if found["gained"]:
            parts.append(_value(middle + gained + 6, y, f"{found['gained']:g}"))
    return _svg(parts, len(ordered), "Answers lost and gained by explaining first, by category")


def _label(text: str, y: int) -> str:
    return str(
        Markup('<text class="label" x="{}" y="{}" text-anchor="end">{}</text>').format(
            _LEFT - 8, y + 17, text
        )
    )


def _value(x: float, y: int, text: str, anchor: str = "start") -> str:
    return str(
        Markup('<text class="value" x="{}" y="{}" text-anchor="{}">{}</text>').format(
            f"{x:.1f}", y + 17, anchor, text
        )
    )


def _bar(x: float, y: int, width: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="18" rx="2"/>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1}" x2="{x2:.1f}" y2="{y2}"/>'


def _svg(parts: Sequence[str], rows: int, title: str) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>').format(
        _WIDTH, rows * _ROW + 4, title, title
    )
    return head + Markup("".join(parts)) + Markup("</svg>")
