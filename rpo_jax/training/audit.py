"""What a run should know of its control tokens before it trains on them."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.model.qwen2 import Params, head_table
from rpo_jax.sharding.rules import constrain

_LOOKED_AT = 256  # records
_MOST_TOLD = 5  # warnings
_SHORT = 0.5  # of the shortest hundredth of the rows in use: such a row was hardly ever trained


def audit_control_tokens(
    tokenizer: Tokenizer, records: Sequence[Mapping[str, Any]], params: Params
) -> list[str]:
    """Warns of control tokens that will not do what their author meant.

    Two mistakes are looked for in a few hundred records. A text spells a control token, such as
    the "<|im_end|>" of a chat template: all text is read as plain text, so it is several ordinary
    tokens and ends nothing. Or a control token that does occur has a row in the embedding or the
    head that was hardly ever trained, as rows of base models often are: it is far shorter than
    those of the ordinary tokens beside it.

    Args:
        tokenizer: of the records.
        records: of text or of pairs.
        params: the weights that the run starts from.

    Returns:
        The warnings, which are logged too.
    """
    places = np.unique(np.linspace(0, len(records) - 1, _LOOKED_AT).astype(int)).tolist()
    counts: Counter[int] = Counter()
    warnings = []
    for place in places:
        for name, ids in _texts(records[place]).items():
            counts.update(ids)
            text = tokenizer.decode([i for i in ids if i not in tokenizer.control])
            warnings += [
                f"record {place} spells {token!r} in its {name}, which is read as plain text and "
                "is no control token here: take it out, or make it tokenizer.end_of_text"
                for token in tokenizer.control.values()
                if token in text
            ]
    found = sorted(counts.keys() & tokenizer.control.keys())
    ordinary = sorted(counts.keys() - tokenizer.control.keys())
    tables = {"embedding": params["embed"]["table"], "head": head_table(params)}
    for name, table_VD in tables.items():
        norms_V = np.asarray(_norms(table_VD))
        least = float(np.quantile(norms_V[ordinary], 0.01))
        warnings += [
            f"{tokenizer.control[i]!r} is trained on, but its row of the {name} has norm "
            f"{norms_V[i]:.3g}, ordinary tokens {least:.3g} and more: it was hardly ever trained; "
            "train it (all weights, or lora.trained_tokens), or choose another "
            "tokenizer.end_of_text"
            for i in found
            if norms_V[i] < _SHORT * least
        ]
    told = ", ".join(f"{tokenizer.control[i]} ({counts[i]} times)" for i in found) or "none"
    logging.info("control tokens in %d records: %s", len(places), told)
    for warning in warnings[:_MOST_TOLD]:
        logging.warning("%s", warning)
    if len(warnings) > _MOST_TOLD:
        logging.warning("%d more such records", len(warnings) - _MOST_TOLD)
    return warnings


def _texts(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """The ids of each text of a record, without padding."""
    if "tokens" in record:
        return {"tokens": record["tokens"][record["segment_ids"] > 0].tolist()}
    return {name: record[name].tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


@jax.jit
def _norms(table_VD: Float[Array, "V D"]) -> Float[Array, "V"]:
    return constrain(jnp.linalg.norm(table_VD.astype(jnp.float32), axis=1), None)
