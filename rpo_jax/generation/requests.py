"""What is asked of a model, and what comes back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rpo_jax.errors import UserError

MAX_SEED = 2**32 - 1

StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Settings:
    """How a completion is drawn and where it ends.

    Attributes:
        max_tokens: the end-of-text token included.
        temperature: 0 takes the most probable token; else logits are divided by it.
        top_k: draw among so many most probable tokens; 0: among all.
        top_p: draw among the most probable tokens that together reach this probability, after
            `temperature` and `top_k`. Tokens as probable as the last one that is in are in too.
        stop: a completion ends before the first of these texts.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        id: of the completion; no two requests share one.
        prompt_ids: its tokens, at least one.
        seed: all randomness of the completion; who else is in the batch changes nothing.
        settings: how to draw, and where to stop.
    """

    id: str
    prompt_ids: Sequence[int]
    seed: int = 0
    settings: Settings = Settings()


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Attributes:
        id: of the request.
        token_ids: what was drawn; with the end-of-text token, and with those that made a stop text.
        text: without either.
        stop_reason: end-of-text token, stop text, or `max_tokens`.
        logprob: of `token_ids` in nats, under the model as it is: temperature 1, nothing cut but
            the rows of the vocabulary that are no tokens.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    stop_reason: StopReason
    logprob: float


def check_settings(settings: Settings, where: str) -> None:
    """Refuses settings that make no sense.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    finite = math.isfinite(settings.temperature) and math.isfinite(settings.top_p)
    for name, fine, wanted in (
        ("max_tokens", settings.max_tokens >= 1, "at least 1"),
        ("temperature", finite and settings.temperature >= 0, "a number that is 0 or more"),
        ("top_k", settings.top_k >= 0, "0 (all) or more"),
        ("top_p", finite and 0 < settings.top_p <= 1, "above 0 and at most 1"),
        ("stop", all(settings.stop), "texts that are not empty"),
    ):
        if not fine:
            raise UserError(f"{where}: {name}={getattr(settings, name)!r}, {wanted} is wanted")


def check_requests(requests: Sequence[Request], vocab_size: int, max_positions: int) -> None:
    """Refuses requests that a model cannot answer, before any work is done.

    Args:
        requests: to be checked.
        vocab_size: ids of prompts are below it.
        max_positions: tokens that prompt and completion may have together.

    Raises:
        UserError: names the request, the value and what is allowed.
    """
    seen: set[str] = set()
    for request in requests:
        where = f"request {request.id!r}"
        check_settings(request.settings, where)
        if request.id in seen:
            raise UserError(f"{where}: there is another of that id; each needs its own")
        seen.add(request.id)
        if not 0 <= request.seed <= MAX_SEED:
            raise UserError(f"{where}: seed={request.seed}, 0 to {MAX_SEED} is wanted")
        if not len(request.prompt_ids):
            raise UserError(f"{where}: its prompt is empty; one token at least is wanted")
        strange = [i for i in request.prompt_ids if not 0 <= i < vocab_size]
        if strange:
            raise UserError(
                f"{where}: its prompt has the id {strange[0]}; the tokenizer ends at "
                f"{vocab_size - 1}"
            )
        length = len(request.prompt_ids) + request.settings.max_tokens
        if length > max_positions:
            raise UserError(
                f"{where}: {len(request.prompt_ids)} prompt tokens and max_tokens="
                f"{request.settings.max_tokens} make {length}; the model has {max_positions} "
                "positions (max_position_embeddings)"
            )
