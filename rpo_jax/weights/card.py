"""The model card, and what the licence of the base model wants beside it."""

from rpo_jax.weights.history import History

# Licence of each base model of Qwen, as its page on the hub states it; the others of the series
# are Apache-2.0. Elsewhere on the hub anything is possible, so nothing is claimed.
_LICENCES = {
    "Qwen2.5-72B": ("qwen", "Qwen LICENSE AGREEMENT"),
    "Qwen2.5-Math-72B": ("qwen", "Qwen LICENSE AGREEMENT"),
    "Qwen2.5-3B": ("qwen-research", "Qwen RESEARCH LICENSE AGREEMENT"),
    "Qwen2.5-Coder-3B": ("qwen-research", "Qwen RESEARCH LICENSE AGREEMENT"),
}
_CHANGED = " The weights were changed by further training, see below."


def _find_licence(base: str) -> tuple[str, str]:
    """Tag and name of the licence of a base model by its hub id; ("", "") if that is not known."""
    owner, _, name = base.partition("/")
    if owner != "Qwen" or not name.startswith("Qwen2.5-"):
        return "", ""
    return _LICENCES.get(name.removesuffix("-Instruct"), ("apache-2.0", "Apache License 2.0"))


def make_notice(base: str) -> bytes:
    """The file NOTICE that Qwen's own licences want with every copy; empty where none is wanted."""
    tag, licence = _find_licence(base)
    if not tag.startswith("qwen"):
        return b""
    notice = (
        f"Qwen is licensed under the {licence}, Copyright (c) Alibaba Cloud. All Rights Reserved."
    )
    return f"{notice}\n".encode()


def make_card(
    base: str,
    weights: str,
    trained: bool,
    history: History,
    library: str = "transformers",
    imported: bool = False,
) -> bytes:
    """A model card in the hub's format.

    Args:
        base: hub id of the base model, or `none`: there is none, or it is not to be named.
        weights: which weights these are: step, number of parameters, dtype.
        trained: whether they are other than those of the base.
        history: how it was trained, on what, and what was measured.
        library: that loads it, by the hub's name.
        imported: whether it began with weights made elsewhere.
    """
    name = base.rpartition("/")[2]
    front = [f"library_name: {library}", "pipeline_tag: text-generation"]
    front += ["tags:", "- medical", "- not-for-clinical-use"]
    if base == "none" and imported:
        origin = (
            "Began with weights that were made elsewhere and imported from files; their base model "
            "was not named. Whatever licence they came under applies."
        )
        if trained:
            origin += _CHANGED
    elif base == "none":
        origin = "Trained from random weights; no published model is its base."
    else:
        tag, licence = _find_licence(base)
        known = ["license: apache-2.0"] if tag == "apache-2.0" else ["license: other"]
        front += [*known, f"license_name: {tag}"] if tag.startswith("qwen") else known
        front += [f"license_link: https://huggingface.co/{base}/blob/main/LICENSE"]
        front += [f"base_model: {base}"]
        link = f"[{base}](https://huggingface.co/{base})"
        origin = f"Derived from {link}; its licence applies to these weights: "
        origin += f"{licence}." if licence else "see there."
        if tag.startswith("qwen"):
            origin += f" Built with Qwen. {make_notice(base).decode().strip()}"
        if trained:
            origin += _CHANGED
    sections = {
        "Not for clinical use": (
            "This is a research model. It is no medical device, nobody has validated it for care, "
            "and it can be wrong while sounding sure. Do not use it to diagnose, to treat, or to "
            "advise patients."
        ),
        "Base model and licence": origin,
        "Weights": weights,
        "Method": history.method or "Not stated.",
        "Data": history.data or "Not stated.",
        "Results": history.results or "Not stated.",
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    lines = "\n".join(front)
    title = "A research model" if base == "none" else f"A model derived from {name}"
    return f"---\n{lines}\n---\n\n# {title}\n\n{body}\n".encode()
