"""The account of what became of the input: nothing is lost without a line here."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rpo_jax.config import Data
from rpo_jax.errors import UserError

NOT_DRAWN = "not drawn (data.corpus.epochs, weights)"  # a mixture has no place for it: not lost


@dataclass
class Drop:
    """Inputs left out for one reason.

    Attributes:
        count: how many.
        example: the first of them.
        largest: the greatest measure among them, in the unit of the reason; 0 where it has none.
        asked: whether the config asks for this: a filter, and not a length that they exceed.
    """

    count: int
    example: str
    largest: int = 0
    asked: bool = False


@dataclass
class Ledger:
    """Counts of what was kept and what was not, and why.

    Attributes:
        unit: what is counted, in the plural.
        kept: inputs that became records.
        dropped: the others, by reason.
        totals: sums over what was kept, such as tokens and characters.
    """

    unit: str
    kept: int = 0
    dropped: dict[str, Drop] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)

    def keep(self, **amounts: int) -> None:
        """Counts one input that becomes records, and what it adds to the totals."""
        self.kept += 1
        self.totals.update(amounts)

    def drop(self, reason: str, example: str, size: int = 0, asked: bool = False) -> None:
        """Counts one input that does not."""
        entry = self.dropped.setdefault(reason, Drop(0, example, asked=asked))
        entry.count += 1
        entry.largest = max(entry.largest, size)

    def add(self, other: "Ledger") -> None:
        """Takes over the counts of inputs that came after those counted here."""
        self.kept += other.kept
        self.totals.update(other.totals)
        for reason, more in other.dropped.items():
            entry = self.dropped.setdefault(reason, dataclasses.replace(more, count=0))
            entry.count += more.count
            entry.largest = max(entry.largest, more.largest)

    @property
    def tokens(self) -> int:
        """All tokens of what was kept."""
        return sum(count for name, count in self.totals.items() if name.endswith("tokens"))

    @property
    def dropped_count(self) -> int:
        """Inputs that did not become records."""
        return sum(entry.count for entry in self.dropped.values())

    @property
    def dropped_share(self) -> float:
        """Of all inputs, the part that did not become records."""
        return self.dropped_count / max(self.kept + self.dropped_count, 1)

    def share(self, asked: bool) -> float:
        """Of all inputs, the part left out because the config asks for it, or all the same."""
        count = sum(entry.count for entry in self.lost(asked).values())
        return count / max(self.kept + self.dropped_count, 1)

    def lost(self, asked: bool) -> dict[str, Drop]:
        """What was left out because the config asks for it, or all the same."""
        return {
            reason: entry
            for reason, entry in self.dropped.items()
            if entry.asked == asked and reason != NOT_DRAWN
        }

    def __str__(self) -> str:
        share = f"{self.dropped_count:,} dropped ({self.dropped_share:.2%})"
        return "\n".join([f"{self.kept:,} {self.unit} kept, {share}", *_list_drops(self.dropped)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"totals": dict(self.totals)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Ledger":
        """The ledger that `to_dict` wrote."""
        drops = {reason: Drop(**entry) for reason, entry in stored["dropped"].items()}
        return cls(stored["unit"], stored["kept"], drops, Counter(stored["totals"]))


def _list_drops(dropped: Mapping[str, Drop]) -> list[str]:
    lines = []
    for reason, entry in dropped.items():
        largest = f", the largest {entry.largest:,}" if entry.largest else ""
        lines.append(f"  {entry.count:,} {reason}{largest}; the first: {entry.example}")
    return lines


def check_shares(ledger: Ledger, split: str, data: Data) -> None:
    """Stops where more was left out than the config allows.

    Raises:
        UserError: with what was left out that counts, and what can be done about it.
    """
    for asked, name, allowed in (
        (False, "data.max_dropped_share", data.max_dropped_share),
        (True, "data.corpus.max_filtered_share", data.corpus.max_filtered_share),
    ):
        if (share := ledger.share(asked)) > allowed:
            counted = ledger.lost(asked)
            too_long = not asked and any(entry.largest for entry in counted.values())
            advice = ["relax the filters named here"] if asked else []
            advice += ["raise the lengths named here"] if too_long else []
            drops = "\n".join(_list_drops(counted))
            raise UserError(
                f"{split}: {share:.2%} of the {ledger.unit} left out, more than "
                f"{name}={allowed:g}\n{drops}\n"
                f"{', or '.join([*advice, f'raise {name}'])} to go on without these"
            )
