"""Many requests through few slots: whoever is done makes room for the next."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError
from rpo_jax.generation.requests import Completion, Request, StopReason, check_requests
from rpo_jax.generation.sampling import Draw
from rpo_jax.generation.slots import (
    Model,
    Rows,
    fill_slots,
    make_slots,
    read_prefix,
    write_tokens,
)
from rpo_jax.model.cache import split_layers
from rpo_jax.model.qwen2 import Network, Params
from rpo_jax.sharding.mesh import is_one_cpu

SLOTS = 16  # completions at a time, where nothing else is said
_ROUND = 64  # sizes of prefix and cache are multiples: similar jobs share their compiled programs

Generate = Callable[..., Iterator[Completion]]


def make_generate(
    network: Network,
    mesh: Mesh,
    tokenizer: Tokenizer,
    *,
    end_ids: Sequence[int] = (),
    slots: int = SLOTS,
    chunk: int = 32,
    steps: int = 16,
) -> Generate:
    """A function `generate(params, requests, prefix_ids=None)` that yields completions as they end.

    The result of a request depends on the weights and on the request alone: not on the mesh, the
    slots, the order, other requests or the prefix (but for float rounding where two choices are
    closer than that).

    Its arguments: `params`, on the mesh (from `split_layers`, or whole ones, of which the layers
    are copied); `requests`, all read before the first is answered; `prefix_ids`, tokens that all
    prompts begin with, run through the network once. None finds the longest such prefix; an empty
    one shares nothing. It raises `UserError` for requests that cannot be answered.

    Args:
        network: shape and dtypes.
        mesh: the device mesh.
        tokenizer: spells completions; ids beyond its own are never drawn.
        end_ids: further ids that end a completion, beside the tokenizer's end of text.
        slots: completions that are written at a time; rounded up to a multiple of the devices
            that rows are cut over.
        chunk: prompt tokens of a row that go through the network at a time.
        steps: tokens after which the host looks for stop texts.

    Raises:
        UserError: the tokenizer has more ids than the network has rows.
    """
    if tokenizer.vocab_size > network.shape.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model only "
            f"{network.shape.vocab_size} rows: they do not belong together"
        )
    ends = tuple(sorted({tokenizer.eos_id, *end_ids}))
    model = Model(network, tokenizer.vocab_size, ends, chunk)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    slots = _round_up(slots, shards)
    group = _round_up(max(slots // 4, 1), shards)

    def generate(
        params: Params, requests: Iterable[Request], prefix_ids: Sequence[int] | None = None
    ) -> Iterator[Completion]:
        waiting = deque(requests)
        check_requests(waiting, tokenizer.vocab_size, network.shape.max_position_embeddings)
        if not waiting:
            return
        shared = _find_prefix(waiting, prefix_ids)
        own = max(len(r.prompt_ids) + r.settings.max_tokens for r in waiting) - len(shared)
        longest = _round_up(max(r.settings.max_tokens for r in waiting), _ROUND)
        with jax.set_mesh(mesh):
            params = split_layers(params, turned=is_one_cpu(mesh))
            prefix = read_prefix(replace(model, chunk=chunk * group), params, shared)
            cache, rows = make_slots(model, slots, _round_up(own, _ROUND), longest)
        running: dict[int, Request] = {}
        while waiting or running:
            free = [slot for slot in range(slots) if slot not in running]
            with jax.set_mesh(mesh):
                while waiting and (len(free) >= min(group, len(waiting)) or not running):
                    slots_R, free = free[:group], free[group:]
                    taken = {slot: waiting.popleft() for slot in slots_R if waiting}
                    filled = _pack(taken, len(shared), group, chunk, padding=slots)
                    cache, rows = fill_slots(model, params, prefix, cache, rows, *filled)
                    running |= taken
                cache, rows = write_tokens(
                    model,
                    params,
                    prefix,
                    cache,
                    rows,
                    np.isin(np.arange(slots), list(running)),
                    np.int32(steps),
                    np.int32(min(group, len(waiting)) if waiting else slots + 1),
                )
            seen: Rows = jax.device_get(rows)
            for slot, request in list(running.items()):
                completion = _finish(request, seen, slot, tokenizer, ends)
                if completion:
                    del running[slot]
                    yield completion

    return generate


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _find_prefix(requests: Sequence[Request], given: Sequence[int] | None) -> np.ndarray:
    """Tokens that all prompts begin with; every prompt keeps at least one token of its own."""
    prompts = [[int(i) for i in request.prompt_ids] for request in requests]
    longest = min(len(prompt) for prompt in prompts) - 1
    if given is not None:
        prefix = [int(i) for i in given]
        for request, prompt in zip(requests, prompts, strict=True):
            if prompt[: len(prefix)] != prefix:
                raise UserError(
                    f"request {request.id!r}: its prompt does not begin with the prefix"
                )
        return np.array(prefix[:longest], np.int32)
    if len(prompts) == 1:
        return np.zeros(0, np.int32)
    first, last = min(prompts), max(prompts)  # all others lie between them
    same = next((i for i in range(longest) if first[i] != last[i]), longest)
    return np.array(first[:same], np.int32)


def _pack(
    taken: dict[int, Request], shared: int, count: int, chunk: int, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Draw, np.ndarray]:
    """The last arguments of `fill_slots`: `count` rows, those without a request in slot `padding`.

    Widths are powers of two times the chunk, so that few programs are compiled.
    """
    owns = [request.prompt_ids[shared:] for request in taken.values()]
    chunks = -(-max(len(own) for own in owns) // chunk)
    tokens_RS = np.zeros((count, chunk << (chunks - 1).bit_length()), np.int32)
    slot_R, length_R = np.full(count, padding, np.int32), np.ones(count, np.int32)
    limit_R, top_k_R = np.ones(count, np.int32), np.zeros(count, np.int32)
    seed_R = np.zeros(count, np.uint32)
    temperature_R, top_p_R = np.zeros(count, np.float32), np.ones(count, np.float32)
    for row, ((slot, request), own) in enumerate(zip(taken.items(), owns, strict=True)):
        settings = request.settings
        tokens_RS[row, : len(own)] = own
        slot_R[row], length_R[row], limit_R[row] = slot, len(own), settings.max_tokens
        seed_R[row], temperature_R[row] = request.seed, settings.temperature
        top_k_R[row], top_p_R[row] = settings.top_k, settings.top_p
    draw = Draw(seed_R, temperature_R, top_k_R, top_p_R)
    return slot_R, tokens_RS, length_R, draw, limit_R


def _finish(
    request: Request, seen: Rows, slot: int, tokenizer: Tokenizer, ends: tuple[int, ...]
) -> Completion | None:
    """The completion in a slot, if it has come to its end."""
    ids = seen.tokens_BG[slot, : seen.count_B[slot]].tolist()
    ended = ids[-1] in ends
    written = ids[:-1] if ended else ids

    def text_before_stop(count: int) -> str | None:
        text = tokenizer.decode(written[:count])
        places = [text.find(stop) for stop in request.settings.stop if stop in text]
        return text[: min(places)] if places else None

    def complete(count: int, text: str, reason: StopReason) -> Completion:
        logprob = float(seen.logps_BG[slot, :count].sum(dtype=np.float64))
        return Completion(request.id, tuple(ids[:count]), text, reason, logprob)

    if text_before_stop(len(written)) is not None:
        # The fewest tokens that have it: however far beyond it the slot has written by now.
        counts = range(len(written) + 1)
        count = bisect_left(counts, True, key=lambda n: text_before_stop(n) is not None)
        return complete(count, text_before_stop(count) or "", "stop")
    if seen.active_B[slot]:
        return None
    return complete(len(ids), tokenizer.decode(written), "eos" if ended else "length")
