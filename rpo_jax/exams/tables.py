"""Scores and reports as tables for the terminal."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_RULES = (
    "official: points by the published rule; extracted: by the answer read out of the text; share: "
    "extracted, of the points possible"
)
_LEGENDS = {
    "vote": "points of the answer most given, over the seeds",
    "parse": "texts with an answer",
    "went-on": "that go on after it",
    "run-on": "that go on into another question",
    "stop": "that ended by themselves",
    "truncation": "that were cut off at the most tokens",
    "found": "by a label, in a phrase or alone; without an answer nothing, one in conflict with "
    "itself, or one unknown to the question",
}


def format_score(result: dict[str, Any]) -> str:
    """One set of answers: points by both rules, by group, pass or fail, and how texts ended."""
    years = ", ".join(map(str, result["years"]))
    lines = [f"{result['exam']} {years}: {result['official']['questions']} questions", ""]
    rows = [["", "points", "of", "share", "right", "of"]]
    rows += [[rule, *_points(result[rule])] for rule in ("official", "extracted")]
    lines += [format_table(rows), _RULES, ""]
    for name, groups in result["by"].items():
        if len(groups) > 1:
            rows = [[name.replace("_", " "), "official", "extracted", "of", "share"]]
            for value, both in groups.items():
                found = both["extracted"]
                shown = [both["official"]["points"], found["points"], found["total"]]
                rows.append([value, *map(str, shown), f"{found['share']:.1%}"])
            lines += [format_table(rows), ""]
    for year, verdict in result["pass"].items():
        lines.append(f"{year}: {_say_verdict(verdict)}")
    rates = result["rates"]
    shares = {name.replace("_", "-"): share for name, share in rates.items() if name != "found"}
    ends = "  ".join(f"{name} {_percent(share)}" for name, share in shares.items())
    found = ", ".join(f"{name} {count}" for name, count in rates["found"].items())
    return "\n".join([*lines, "", ends, f"found: {found}", _explain([*shares, "found"])])


def format_report(report: dict[str, Any], place: Path) -> str:
    """One or several sittings: points by mode, the paired comparison, how texts ended, paths.

    Args:
        report: as `exams.report` builds it.
        place: where it was written, without suffixes.
    """
    asked = report["questions"]
    years = ", ".join(map(str, report["years"]))
    lines = [f"{report['title']} {years}: {asked['asked']} of {asked['of']} questions", ""]
    ends = ("vote", "parse", "run-on", "stop")
    rows = [["", "", "official", "extracted", "of", "share", *ends]]
    for model in report["models"]:
        for mode, found in model["modes"].items():
            points = found["points"]
            first = next(iter(found["seeds"].values()))["rates"]
            rows.append(
                [
                    model["name"],
                    mode,
                    f"{points['official']['mean']:g}",
                    f"{points['extracted']['mean']:g}",
                    str(asked["points"]),
                    f"{points['extracted']['mean'] / max(asked['points'], 1):.1%}",
                    "-" if found["vote"] is None else str(found["vote"]["points"]),
                    *(_percent(first[name]) for name in ("parse", "run_on", "stop")),
                ]
            )
        if letters := model["likelihood"]:
            shown = [str(letters["points"]), str(letters["total"]), f"{letters['share']:.1%}"]
            rows.append([model["name"], "likeliest letter", "-", *shown, *["-"] * 4])
    for name, found in report["published"].items():
        share = f"{found['points'] / max(asked['points'], 1):.1%}"
        shown = [str(found["points"]), "-", str(asked["points"]), share]
        rows.append([name, "published", *shown, *["-"] * 4])
    lines += [format_table(rows), _RULES, _explain(ends), ""]
    for model in report["models"]:
        if found := model["comparison"]:
            lines.append(f"{model['name']}: explaining first {_say_difference(found)}")
    for found in report["comparisons"]:
        names = f"{found['model']} against {found['against']}, {found['mode']}"
        lines.append(f"{names}: {_say_difference(found)}")
    return "\n".join([*lines, f"report: {place}.html, {place}.json"])


def _explain(columns: Sequence[str]) -> str:
    """The legend of columns."""
    return "; ".join(f"{name}: {_LEGENDS[name]}" for name in columns)


def _say_difference(found: dict[str, Any]) -> str:
    """A paired comparison, as `exams.statistics.compare` makes it."""
    points, share, first = found["points"], found["share"], found["mcnemar"][0]
    tests = ", ".join(f"{test['p_value']:.3g}" for test in found["mcnemar"])
    return (
        f"{points['difference']:+g} points ({found['confidence']:.0%} interval {points['low']:+g} "
        f"to {points['high']:+g}), {share['difference']:+.1%} of all; {first['lost']} lost, "
        f"{first['gained']} gained; McNemar p = {tests}"
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first one flush left; wide characters count double."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - _width(first))]
        cells += [
            " " * (width - _width(x)) + x for x, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _points(tally: dict[str, Any]) -> list[str]:
    shown = [tally["points"], tally["total"], f"{tally['share']:.1%}"]
    return [*map(str, shown), str(tally["right"]), str(tally["questions"])]


def _say_verdict(verdict: dict[str, Any]) -> str:
    passed = {True: "passed", False: "failed", None: "not decided"}
    parts = []
    if "required" in verdict:
        for name, mark in (("required", "pass_share"), ("general", "pass_points")):
            part = verdict[name]
            wanted = part[mark]
            wanted = f"{wanted:.0%}" if mark == "pass_share" else (wanted or "an unknown mark")
            parts.append(f"{name} {part['points']}/{part['total']} (wanted {wanted})")
    if "prohibited" in verdict:
        part = verdict["prohibited"]
        parts.append(f"prohibited choices {part['chosen']} (fails from {part['fails_from']})")
    return "; ".join([passed[verdict["passed"]], *parts])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
