"""What goes out beside the weights: config, end-of-text id, tokenizer."""

import json
from typing import Any

from etils import epath

from rpo_jax.weights.shards import read_json
from rpo_jax.weights.source import KEPT_FILES
from rpo_jax.weights.store import DTYPES

_END_OF_TEXT = "<|endoftext|>"


def describe_release(model: epath.Path, dtype: str) -> tuple[dict[str, bytes], list[str]]:
    """The small files of an export, by name: those that were kept, changed only where they must be.

    Also tells what was changed, a line each.

    `config.json` changes if it names another dtype than the weights get. `generation_config.json`
    changes, or is made, if it does not stop at the tokenizer's end of text.

    Raises:
        UserError: one of them is not JSON.
    """
    files = {name: (model / name).read_bytes() for name in KEPT_FILES if (model / name).exists()}
    changes = []
    config, wanted = read_json(model / "config.json"), DTYPES[dtype].name
    for key in ("torch_dtype", "dtype"):
        if config.get(key, wanted) != wanted:
            files["config.json"] = _dump(config := config | {key: wanted})
            changes.append(f"config.json: {key} is now {wanted}")
    end = _find_end_of_text(model, config)
    generation = model / "generation_config.json"
    found = read_json(generation) if generation.exists() else {}
    stops = found.get("eos_token_id")
    if end is not None and end not in (stops if isinstance(stops, list) else [stops]):
        files[generation.name] = _dump(found | {"eos_token_id": end})
        changes.append(
            f"generation_config.json: eos_token_id is now {end}, the tokenizer's end of text; it "
            f"was {stops}"
        )
    return files, changes


def _find_end_of_text(model: epath.Path, config: dict[str, Any]) -> int | None:
    if (model / "tokenizer.json").exists():
        for token in read_json(model / "tokenizer.json").get("added_tokens", []):
            if token.get("content") == _END_OF_TEXT:
                return token["id"]
    stop = config.get("eos_token_id")
    return stop if isinstance(stop, int) else None


def _dump(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
