"""Numeric answers: the mark sheet's slots, what their digits mean, and numbers in free text.

A numeric question ends in a template, ``解答：①.②g/日``: a slot a digit. The published golds are
the digits of the slots, with the point sometimes kept and sometimes lost ("21" is 2.1).
"""

import re
from dataclasses import dataclass
from decimal import Decimal

SLOTS = "[①-⑨]"
_SLOT = re.compile(r"⟨(\d)⟩")
_TEMPLATE = re.compile(r"解答\s*:\s*(.*⟨\d⟩.*)\s*$")
_DIGITS = r"\d{1,3}(?:,\s?\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
_VALUE = re.compile(rf"[\s約およそ(「『\[\"'=:{{]*(-?(?:{_DIGITS}))")
_UNIT = (  # of a number in a text; a power like m2 is none of its digits
    r"(?:/?\s?人口\s?[\d,]+\s?対|[a-z%/℃μ度人回日分倍歳個点本枚・]+(?:(?<=[a-z])[\^]?-?[23](?!\d))?)+"
)


@dataclass(frozen=True)
class Slots:
    """The template of a numeric answer: its shape, with ⟨1⟩ for the first slot, and its unit."""

    shape: str = ""
    unit: str = ""


def find_slots(text: str) -> Slots:
    """The template of a question's text, in which slots are written ⟨1⟩; empty if it has none."""
    found = _TEMPLATE.search(text)
    if not found:
        return Slots()
    end = max(slot.end() for slot in _SLOT.finditer(found[1]))
    return Slots(found[1][:end], found[1][end:].strip())


def fill(slots: Slots, digits: str) -> str:
    """The number that digits make in the slots: 21 in ``⟨1⟩.⟨2⟩`` is 2.1; "" if they do not fit."""
    if len(digits) != len(_SLOT.findall(slots.shape)) or not digits.isdecimal():
        return ""
    left = iter(digits)
    number = re.sub(r"[,\s]", "", _SLOT.sub(lambda _: next(left), slots.shape))
    return number if re.fullmatch(r"\d+(\.\d+)?", number) else ""


def same_number(number: str, gold: str, slots: Slots) -> bool:
    """Whether a number is the gold: its digits as published, or their value in the slots."""
    meant = fill(slots, gold.replace(".", "")) or gold
    return number == gold or Decimal(number) == Decimal(meant)


def read_number(text: str, start: int, slots: Slots) -> tuple[int, str] | None:
    """Where a number at `start` ends, and its digits: "" for two numbers that contradict.

    A sum is worth what its last ``=`` says; slots that are filled one by one are put together.
    """
    line_end = text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    stop = text.find("。", start, line_end)
    end = line_end if stop < 0 else stop
    if filled := _read_slots(text[start:end], slots):
        return end, filled
    if len(set(re.findall(r"⟨\d⟩\s*\d", text))) > 1 and re.match(r"\s*⟨", text[start:end]):
        return end, ""  # several slots, filled otherwise than with a digit each
    # One number behind a slot's mark is the whole number.
    text = text[:start] + _SLOT.sub("   ", text[start:end]) + text[end:]
    begin = max(text.rfind("=", start, end) + 1, start)
    value = _VALUE.match(text, begin, end)
    if not value:
        return None
    unit = re.compile(rf"\s*(?:{re.escape(slots.unit)}|{_UNIT})?").match(text, value.end(), end)
    finish = unit.end() if unit else value.end()
    if re.search(r"\d", text[finish:end]):
        return end, ""
    return finish, re.sub(r"[,\s]", "", value[1])


def _read_slots(text: str, slots: Slots) -> str:
    found = dict(re.findall(r"⟨(\d)⟩\s*[=:はに]?\s*(\d)(?![\d.])", text))
    wanted = _SLOT.findall(slots.shape)
    if not wanted or set(found) != set(wanted):
        return ""
    return fill(slots, "".join(found[slot] for slot in wanted))
