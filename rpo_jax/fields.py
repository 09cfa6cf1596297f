"""Fields of a strict configuration: declared with meaning and limits, read without guessing.

A section is a frozen dataclass whose fields are made by `option` or `required`, or are sections.
"""

import dataclasses
import difflib
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

_REQUIRED = object()
Number = int | float


def option(
    default: Any,
    doc: str,
    *,
    above: Number | None = None,
    at_least: Number | None = None,
    below: Number | None = None,
    at_most: Number | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A config field: its default, what it means, and which values are allowed."""
    metadata = {
        "doc": doc,
        "above": above,
        "at_least": at_least,
        "below": below,
        "at_most": at_most,
        "choices": choices,
    }
    if default is _REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(doc: str, **limits: Any) -> Any:
    """A config field without a default: a config that leaves it out is refused."""
    return option(_REQUIRED, doc, **limits)


def defaults(cls: type) -> ConfigDict:
    """Every field of a section, at its default; a required one is an empty placeholder."""
    values = {}
    for field, kind in _fields(cls):
        if dataclasses.is_dataclass(kind):
            values[field.name] = defaults(kind)  # type: ignore[arg-type]
        elif field.default is dataclasses.MISSING:
            values[field.name] = config_dict.placeholder(kind)
        else:
            values[field.name] = field.default
    return ConfigDict(values)


def _fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def build(
    cls: type, values: Mapping[str, Any] | ConfigDict, problems: list[str], prefix: str = ""
) -> Any:
    """The section that `values` describe; None where there are problems.

    Args:
        cls: of the section.
        values: by the names of its fields.
        problems: gets a line for each unknown, missing, mistyped or out-of-range field, with its
            dotted name, the value and what is allowed.
        prefix: of the dotted names.
    """
    known = [field.name for field, _ in _fields(cls)]
    problems.extend(
        f"{prefix}{key} is not a field{suggestion(key, known)}"
        for key in values
        if key not in known
    )
    built = {}
    for field, kind in _fields(cls):
        name = prefix + field.name
        value = values.get(field.name)
        if dataclasses.is_dataclass(kind):
            if value is not None and not isinstance(value, Mapping | ConfigDict):
                problems.append(f"{name} is a section with fields of its own, not {value!r}")
                continue
            built[field.name] = build(kind, value or {}, problems, name + ".")  # type: ignore[arg-type]
        elif value is None and field.default is dataclasses.MISSING:
            problems.append(f"{name} is missing: {field.metadata['doc']}")
        elif value is None:
            built[field.name] = field.default
        else:
            value, problem = _convert(value, kind)
            problem = problem or _limit(value, field.metadata)
            if problem:
                problems.append(f"{name}={value!r}: {problem}")
            built[field.name] = value
    return cls(**built) if not problems else None


def suggestion(name: str, known: list[str]) -> str:
    """A hint that ends an error: the closest known name, or the list of all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _convert(value: Any, kind: Any) -> tuple[Any, str]:
    if isinstance(kind, types.GenericAlias):
        item = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            return value, f"a list of {item.__name__} is wanted"
        pairs = [_convert(v, item) for v in value]
        return tuple(v for v, _ in pairs), next((p for _, p in pairs if p), "")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), ""
    if type(value) is not kind:
        return value, f"{kind.__name__} is wanted, not {type(value).__name__}"
    return value, ""


def _limit(value: Any, limits: Mapping[str, Any]) -> str:
    if limits["choices"] is not None and value not in limits["choices"]:
        return f"one of {', '.join(choice or '(empty)' for choice in limits['choices'])} is wanted"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number is wanted"
    if limits["above"] is not None and not value > limits["above"]:
        return f"must be above {limits['above']}"
    if limits["at_least"] is not None and not value >= limits["at_least"]:
        return f"must be at least {limits['at_least']}"
    if limits["below"] is not None and not value < limits["below"]:
        return f"must be below {limits['below']}"
    if limits["at_most"] is not None and not value <= limits["at_most"]:
        return f"must be at most {limits['at_most']}"
    return ""


def describe(cls: type, prefix: str = "") -> Iterator[str]:
    """A line a field (name=default [choices] meaning, cut where it is too long), by section."""
    if prefix:
        yield from ("", _cut(f"{prefix[:-1]}: {(cls.__doc__ or '').splitlines()[0]}"))
    for field, kind in _fields(cls):
        if not dataclasses.is_dataclass(kind):
            choices = field.metadata["choices"]
            allowed = f"[{'|'.join(choice or repr('') for choice in choices)}] " if choices else ""
            head = f"  {prefix}{field.name}={_tell_default(field)}"
            yield _cut(f"{head:<36}  {allowed if len(allowed) < 40 else ''}{field.metadata['doc']}")
    for field, kind in _fields(cls):
        if dataclasses.is_dataclass(kind):
            yield from describe(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]


def explain(cls: type, wanted: str, prefix: str = "") -> Iterator[str]:
    """All that is known of a field, or of each field of a section; `wanted` is its dotted name."""
    for field, kind in _fields(cls):
        name = prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from explain(kind, wanted, f"{name}.")  # type: ignore[arg-type]
        elif f"{name}.".startswith(f"{wanted}."):
            yield f"--config.{name}={_tell_default(field)}"
            yield textwrap.indent(textwrap.fill(field.metadata["doc"], 96), "    ")
            yield from (f"    {limit}" for limit in _tell_limits(field.metadata))


def _tell_default(field: dataclasses.Field[Any]) -> str:
    return "(required)" if field.default is dataclasses.MISSING else repr(field.default)


def _tell_limits(metadata: Mapping[str, Any]) -> Iterator[str]:
    if metadata["choices"]:
        yield f"one of {', '.join(map(repr, metadata['choices']))}"
    for name in ("above", "at_least", "below", "at_most"):
        if metadata[name] is not None:
            yield f"{name.replace('_', ' ')} {metadata[name]}"


def _cut(line: str, width: int = 100) -> str:
    return line if len(line) <= width else f"{line[: width - 4].rsplit(' ', 1)[0]} ..."


def names(cls: type, prefix: str = "") -> Iterator[str]:
    """Every field and section by its dotted name."""
    for field, kind in _fields(cls):
        yield prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from names(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
