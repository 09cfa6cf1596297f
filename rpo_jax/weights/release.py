"""What goes out beside the weights: config, end-of-text id, tokenizer, model card."""

import json
from typing import Any

from etils import epath

from rpo_jax.weights.shards import read_json
from rpo_jax.weights.source import KEPT_FILES

_END_OF_TEXT = "<|endoftext|>"
_DTYPE_NAMES = {"BF16": "bfloat16", "F32": "float32"}

# Licence of each released base model, as its page on the hub states it; the others are Apache-2.0.
_LICENCES = {
    "Qwen2.5-72B": ("qwen", "Qwen LICENSE AGREEMENT"),
    "Qwen2.5-3B": ("qwen-research", "Qwen RESEARCH LICENSE AGREEMENT"),
}


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
    config = read_json(model / "config.json")
    for key in ("torch_dtype", "dtype"):
        if config.get(key, _DTYPE_NAMES[dtype]) != _DTYPE_NAMES[dtype]:
            files["config.json"] = _dump(config := config | {key: _DTYPE_NAMES[dtype]})
            changes.append(f"config.json: {key} is now {_DTYPE_NAMES[dtype]}")
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


def make_card(base: str, weights: str, method: str, data: str, results: str) -> bytes:
    """A model card in the hub's format.

    Args:
        base: hub id of the base model, or `none`.
        weights: which weights these are: step, number of parameters, dtype.
        method: Markdown: how it was trained.
        data: Markdown: on what.
        results: Markdown: what was measured.
    """
    name = base.rpartition("/")[2]
    tag, licence = _LICENCES.get(name.removesuffix("-Instruct"), ("", "Apache License 2.0"))
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += ["tags:", "- medical", "- not-for-clinical-use"]
    if base == "none":
        origin = "Trained from random weights; there is no base model."
    else:
        front += ["license: other", f"license_name: {tag}"] if tag else ["license: apache-2.0"]
        front += [f"license_link: https://huggingface.co/{base}/blob/main/LICENSE"]
        front += [f"base_model: {base}"]
        notice = "Built with Qwen. Copyright (c) Alibaba Cloud. All Rights Reserved." if tag else ""
        origin = (
            f"Derived from [{base}](https://huggingface.co/{base}), which is licensed under the "
            f"{licence}; that licence applies to these weights. {notice}"
        ).strip()
    sections = {
        "Not for clinical use": (
            "This is a research model. It is no medical device, nobody has validated it for care, "
            "and it can be wrong while sounding sure. Do not use it to diagnose, to treat, or to "
            "advise patients."
        ),
        "Base model and licence": origin,
        "Weights": weights,
        "Method": method or "Not stated.",
        "Data": data or "Not stated.",
        "Results": results or "Not stated.",
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    lines = "\n".join(front)
    title = "A research model" if base == "none" else f"A model derived from {name}"
    return f"---\n{lines}\n---\n\n# {title}\n\n{body}\n".encode()
