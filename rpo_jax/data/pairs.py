"""Preference pairs: read, checked, tokenised."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from rpo_jax.data.files import read_objects, take_string
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError

SUFFIXES = (".jsonl",)


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a dispreferred response, as text."""

    id: str
    prompt: str
    chosen: str
    rejected: str


def read_pairs(paths: Iterable[epath.PathLike]) -> Iterator[Pair]:
    """The pairs of JSONL files with the strings `id`, `prompt`, `chosen` and `rejected`.

    Other fields are ignored.

    Raises:
        UserError: with file and line: a field is missing, not a string or empty, an id occurs
            twice, or both responses are the same.
    """
    first_seen: dict[str, str] = {}
    for path in paths:
        for where, record in read_objects(path):
            names = ("id", "prompt", "chosen", "rejected")
            pair = Pair(**{name: take_string(where, record, name) for name in names})
            for name in names:
                if not getattr(pair, name).strip():
                    raise UserError(f"{where}: {name!r} is empty")
            if pair.chosen == pair.rejected:
                raise UserError(f"{where}: 'chosen' and 'rejected' are the same text")
            if pair.id in first_seen:
                raise UserError(
                    f"{where}: id {pair.id!r} occurs twice, first at {first_seen[pair.id]}"
                )
            first_seen[pair.id] = where
            yield pair


def tokenise_pairs(
    pairs: Iterable[Pair],
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    response_length: int,
    ledger: Ledger,
) -> Iterator[dict[str, Any]]:
    """Records of pairs, as `records.pair_features` describes them.

    Prompt and response are tokenised apart, so that no token crosses the border, and the
    end-of-text id is the last token of each response. What does not fit is dropped and told to the
    ledger; nothing is cut.

    Args:
        pairs: read as a stream.
        tokenizer: takes text as plain text.
        prompt_length: most tokens of a prompt.
        response_length: most tokens of a response, its end of text included.
        ledger: learns the pairs, the tokens by part, and the drops.
    """
    slots = {"prompt": prompt_length, "chosen": response_length, "rejected": response_length}
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    for pair in pairs:
        ids = {
            "prompt": tokenizer.encode(pair.prompt),
            "chosen": [*tokenizer.encode(pair.chosen), tokenizer.eos_id],
            "rejected": [*tokenizer.encode(pair.rejected), tokenizer.eos_id],
        }
        size, name = max((len(ids[name]) - slots[name], name) for name in ids)
        if size > 0:
            reason = f"{name} longer than data.{fields[name]}_length={slots[name]} tokens"
            ledger.drop(reason, pair.id, len(ids[name]))
            continue
        if ids["chosen"] == ids["rejected"]:
            ledger.drop("chosen and rejected have the same tokens", pair.id)
            continue
        ledger.keep(**{f"{name}_tokens": len(ids[name]) for name in ids})
        arrays = {f"{name}_ids": np.array(ids[name], np.int32) for name in ids}
        yield {"id": pair.id, **arrays}
