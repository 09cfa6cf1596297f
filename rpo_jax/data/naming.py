"""Ids: within a split each names one document, or the input is refused.

Of a document with an id of its own a hash is kept, 8 bytes. Where two of them agree, the documents
are read again, to compare the ids themselves and to tell where both stand.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt64

from rpo_jax.data.copies import find_groups
from rpo_jax.data.corpus import Document, read_documents
from rpo_jax.data.screening import hash_text
from rpo_jax.data.textplan import Plan
from rpo_jax.errors import UserError


def hash_name(split: str, document: Document) -> int:
    """64 bits of what an id is compared by."""
    return hash_text(f"{split}\0{document.id}")[0]


def check_names(plan: Plan, names: Sequence[UInt64[np.ndarray, "..."]]) -> None:
    """Refuses input in which two documents of a split have the same id.

    Args:
        plan: of the input.
        names: `hash_name` of the documents of each part that have an id, in order.

    Raises:
        UserError: tells of the first document whose id stood before.
    """
    ends = np.cumsum([len(part) for part in names])
    found = [group[:2].tolist() for group in find_groups(np.concatenate(names))]
    for first, second in sorted(found, key=lambda pair: pair[1]):
        (split, one), (other, two) = (_look_up(plan, ends, place) for place in (first, second))
        if (split, one.id) == (other, two.id):
            raise name_clash(one.id, one.where, two.where)


def name_clash(name: str, first: str, second: str) -> UserError:
    """The complaint about an id that stands in two places."""
    return UserError(
        f"{second}: id {name!r} occurs twice, first at {first}; name them apart, or all documents "
        "by file and line (--config.data.corpus.id_field='')"
    )


def _look_up(plan: Plan, ends: np.ndarray, place: int) -> tuple[str, Document]:
    """The document that is at a place among all that have an id, and its split."""
    part = int(np.searchsorted(ends, place, "right"))
    before = int(ends[part - 1]) if part else 0
    return next(itertools.islice(_read_named(plan, part), place - before, None))


def _read_named(plan: Plan, part: int) -> Iterator[tuple[str, Document]]:
    fields = plan.data.corpus.text_field, plan.data.corpus.id_field
    for piece in plan.parts[part]:
        for document in read_documents(piece.span, *fields):
            if document.named:
                yield plan.sources[piece.source].split, document
