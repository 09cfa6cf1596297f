"""What the scalars of a run are called, and what they mean, for tables that explain themselves."""

from collections.abc import Mapping

# By the end of a name: unit, and what it is.
_MEANINGS = {
    "loss": "what training lowers",
    "nll": "nats/token (of pairs: of the tokens that rpo.nll_tokens names)",
    "general_nll": "nats/token of the general text",
    "dpo": "nats a pair; 0.6931 is no preference",
    "ipo": "squared nats a pair (a token, if length-normalised); no preference: 1 / (2 rpo.beta)^2",
    "simpo": "nats a pair",
    "orpo": "nats a pair, times rpo.beta; 0.6931 times rpo.beta is no preference",
    "preference_accuracy": "share of pairs: the chosen response is the likelier one",
    "reward_accuracy": "share of pairs: the chosen response gained more (a tie is half)",
    "margin": "nats a pair: how much more the chosen response gained",
    "chosen_logp": "nats a response",
    "rejected_logp": "nats a response",
    "chosen_log_ratio": "nats a response, gained since the start of the stage",
    "rejected_log_ratio": "nats a response, gained since the start of the stage",
    "share": "of the points, by the answer read out of the text",
    "official_share": "of the points, by the published rule",
    "parse": "share of texts with an answer",
    "run_on": "share of texts that go on into another question",
    "stop": "share of texts that ended by themselves",
    "truncation": "share of texts that were cut for length",
}


def explain_measure(name: str) -> str:
    """Unit and meaning of a scalar; "" if it is not known here."""
    return _MEANINGS.get(name.rsplit("/", 1)[-1], "")


def format_measures(title: str, columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table, line by line: a measure a row, a column of values each, and what it means.

    Args:
        title: heads the names.
        columns: values by measure, by the head of the column; the last one says which there are.
    """
    lines = [f"{title:<28}" + "".join(f"{head:>11}" for head in columns)]
    for name in list(columns.values())[-1]:
        cells = [f"{found[name]:.4f}" if name in found else "-" for found in columns.values()]
        values = "".join(f"{cell:>11}" for cell in cells)
        lines.append(f"{name:<28}{values}  {explain_measure(name)}".rstrip())
    return lines
