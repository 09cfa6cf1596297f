"""Documents on the disk between the steps: texts one after the other, and where each one lies."""

import array
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpo_jax.data.corpus import Document
from rpo_jax.data.naming import hash_name
from rpo_jax.data.overlap import BINS, band_keys
from rpo_jax.data.screening import Account
from rpo_jax.data.textplan import Plan, screen_part
from rpo_jax.writing import write_array, write_json

_ENTRY = np.dtype(
    [
        ("high", "<u8"),
        ("low", "<u8"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("characters", "<u4"),
        ("id_size", "<u4"),
        ("source", "<u2"),
        ("split", "u1"),
    ]
)


@dataclass(frozen=True)
class Spill:
    """The folder where the screened parts of a plan lie."""

    plan: Plan
    folder: Path

    def screen(self, number: int) -> None:
        """Screens a part and writes what passed; does nothing if that is there."""
        if self._path(number, "json").exists():
            return
        plan = self.plan
        account, rows, signatures, names = Account(), [], [], array.array("Q")
        splits = {split: i for i, split in enumerate(plan.splits)}
        offset = 0

        def meet(split: str, document: Document) -> None:
            names.append(hash_name(split, document))

        with self._path(number, "texts").open("wb") as file:
            for found in screen_part(plan, number, account, meet):
                name, text = found.id.encode(), found.text.encode()
                file.write(name + text)
                sizes = len(text), len(found.text), len(name)
                place = found.source, splits[found.split]
                rows.append((found.high, found.low, offset, *sizes, *place))
                offset += len(name) + len(text)
                if plan.data.corpus.near_copies:
                    signatures.append(found.sign())
        write_array(self._path(number, "index.npy"), np.array(rows, _ENTRY))
        write_array(self._path(number, "names.npy"), np.array(names, np.uint64))
        if plan.data.corpus.near_copies:
            signed = np.array(signatures, np.uint32).reshape(-1, BINS)
            write_array(self._path(number, "signatures.npy"), signed)
            write_array(self._path(number, "keys.npy"), band_keys(signed))
        write_json(self._path(number, "json"), account.to_dict())

    def account(self) -> Account:
        """What became of the documents of all parts."""
        account = Account()
        for number in range(len(self.plan.parts)):
            account.add(Account.from_dict(read_json(self._path(number, "json"))))
        return account

    def load(self, kind: str) -> list[np.ndarray]:
        """The `index`, `names`, `signatures` or `keys` of each part, a line a document."""
        return [self.load_part(kind, number) for number in range(len(self.plan.parts))]

    def load_part(self, kind: str, number: int) -> np.ndarray:
        """The same of one part."""
        return np.load(self._path(number, f"{kind}.npy"), mmap_mode="r")

    def read(self, number: int, entry: Any) -> tuple[str, str]:
        """Id and text of a document of a part; `entry` is its line in the index."""
        with self._path(number, "texts").open("rb") as file:
            file.seek(int(entry["offset"]))
            content = file.read(int(entry["id_size"]) + int(entry["size"]))
        return content[: entry["id_size"]].decode(), content[entry["id_size"] :].decode()

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"part-{self.plan.part_keys[number][:16]}.{kind}"


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
