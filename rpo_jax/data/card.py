"""The data card: a record set in words, for people. `dataset.json` beside it says the same."""

from collections.abc import Mapping
from typing import Any

from rpo_jax.data.ledger import Ledger

CARD_FILE = "card.md"
_CONTACTS = 20  # questions listed, those that came nearest first


def render_card(info: Mapping[str, Any]) -> str:
    """The card of a set of text rows, in Markdown.

    Args:
        info: content of its `dataset.json`.
    """
    ledger = Ledger.from_dict(info["ledger"])
    provenance = info["provenance"]
    tokens, characters = ledger.totals["tokens"], ledger.totals["characters"]
    lines = [
        f"# Record set {info['fingerprint'][:16]} ({provenance['split']})",
        "",
        f"{info['records']:,} rows of {info['row_tokens']:,} tokens; {tokens:,} tokens, "
        f"fill {tokens / (info['records'] * info['row_tokens']):.2%}; "
        f"{characters:,} characters, {characters / tokens:.3f} a token.",
        "",
        "| source | passes | documents | characters | tokens | characters a token |",
        "|---|---|---|---|---|---|",
    ]
    for source in info["sources"]:
        counts = (f"{source[name]:,}" for name in ("documents", "characters", "tokens"))
        fertility = source["characters"] / max(source["tokens"], 1)
        cells = (source["name"], f"{source['passes']:.3g}", *counts, f"{fertility:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What became of the documents", "", "```", str(ledger), "```", ""]
    if info["questions"]:
        lines += [*_tell_questions(info["questions"], provenance["corpus"]["max_overlap"]), ""]
    lines += ["## Samples", ""]
    for sample in info["samples"]:
        lines += [f"`{sample['id']}`", "", "```", sample["text"], "```", ""]
    settings = {**provenance["corpus"], "tokenizer": provenance["tokenizer"]}
    lines += ["## Settings", "", *(f"- {name}: {value!r}" for name, value in settings.items()), ""]
    lines += ["## Files", "", "| file | bytes | sha256 |", "|---|---|---|"]
    lines += [f"| {f['path']} | {f['bytes']:,} | {f['sha256']} |" for f in provenance["files"]]
    return "\n".join(lines) + "\n"


def _tell_questions(questions: Mapping[str, Any], most: float) -> list[str]:
    contacts = questions["contacts"]
    hit = sum(contact["documents"] > 0 for contact in contacts.values())
    lines = [
        "## Questions of the evaluation",
        "",
        f"{questions['checked']:,} texts of questions were looked for; {hit:,} questions were held "
        f"by documents (more than {most:.0%} of a text's runs of 13 letters), which are left out. "
        f"The nearest:",
        "",
        "| question | documents left out | largest share | in |",
        "|---|---|---|---|",
    ]
    nearest = sorted(contacts, key=lambda q: (-contacts[q]["share"], q))[:_CONTACTS]
    for question in nearest:
        contact = contacts[question]
        lines.append(
            f"| {question} | {contact['documents']:,} | {contact['share']:.2f} | "
            f"{contact['example']} |"
        )
    if questions["too_short"]:
        lines += ["", f"Too short to be looked for: {', '.join(questions['too_short'])}."]
    return lines
