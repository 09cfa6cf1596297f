"""A model as a candidate: it writes answers, and it weighs the letters of a choice."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from rpo_jax.errors import UserError
from rpo_jax.exams.asking import Answer, Ask, Drawing
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.phrasing import Phrasing
from rpo_jax.exams.prompts import PromptFormat
from rpo_jax.exams.responses import Response, predict
from rpo_jax.generation.batching import Generate
from rpo_jax.generation.requests import Request, Settings
from rpo_jax.losses.token_logps import Projection, token_logps
from rpo_jax.model.qwen2 import Network, Params, forward, head_table
from rpo_jax.sharding.rules import batch_sharding, replicated

_ROUND = 64  # row lengths are multiples, so that few programs are compiled


def make_answer(generate: Generate, params: Params, phrasing: Phrasing, drawing: Drawing) -> Answer:
    """A function that puts questions of one mode to a model and yields responses as they end.

    The random numbers of an answer follow from seed, mode and question alone.
    """

    def answer(asks: Sequence[Ask]) -> Iterator[tuple[Ask, Response]]:
        by_id = {f"{ask.mode} {ask.seed} {ask.question.id}": ask for ask in asks}
        requests = [
            Request(
                id_,
                phrasing.encode(ask.prompt),
                zlib.crc32(id_.encode()),
                Settings(
                    drawing.max_tokens[ask.mode],
                    drawing.temperature,
                    drawing.top_k,
                    drawing.top_p,
                    drawing.stop,
                ),
            )
            for id_, ask in by_id.items()
        ]
        for completion in generate(params, requests):
            ask = by_id[completion.id]
            yield (
                ask,
                Response(
                    ask.question.id,
                    completion.text,
                    predict(completion.text),
                    completion.stop_reason,
                    len(completion.token_ids),
                ),
            )

    return answer


def has_one_letter(question: Question) -> bool:
    """Whether a question is answered by exactly one letter, so that letters can be weighed."""
    return not question.is_numeric and len(question.accepted[0]) == 1


Weigh = Callable[[Params, Sequence[tuple[Question, str]]], Iterator[tuple[Question, np.ndarray]]]


def make_weigh(
    network: Network, mesh: Mesh, phrasing: Phrasing, style: PromptFormat, rows: int = 8
) -> Weigh:
    """A function from weights and (question, prompt) to the log-probability of each letter.

    One pass a question: what the letters' responses begin with alike is part of the row, and their
    last tokens are compared behind it.

    Args:
        network: shape and dtypes.
        mesh: the device mesh.
        phrasing: how the model is asked.
        style: gives the response of a letter.
        rows: questions at a time; rounded up to the devices that rows are cut over.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-rows // shards) * shards

    def score(params: Params, batch: dict[str, Array]) -> Array:
        hidden_BTD = forward(
            network,
            params,
            batch["tokens"],
            batch["segment_ids"],
            jnp.zeros_like(batch["tokens"]),
            batch["positions"],
        )
        hidden_BMD = jnp.take_along_axis(hidden_BTD, batch["target_index"][..., None], axis=1)
        used = Projection(chunk=8, used_vocab=phrasing.tokenizer.vocab_size)
        return token_logps(hidden_BMD, head_table(params), batch["labels"], used)

    compiled = jax.jit(
        score, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh)
    )

    def weigh(
        params: Params, asked: Sequence[tuple[Question, str]]
    ) -> Iterator[tuple[Question, np.ndarray]]:
        rest = [(q, *_lay_out(phrasing, style, q, prompt)) for q, prompt in asked]
        widest = max((len(question.letters) for question, *_ in rest), default=0)
        rest.sort(key=lambda row: len(row[1]))
        with jax.set_mesh(mesh):
            for start in range(0, len(rest), rows):
                part = rest[start : start + rows]
                padded = part + [part[-1]] * (rows - len(part))
                logps_BM = np.asarray(compiled(params, _stack(padded, widest)))
                for (question, *_), logps_M in zip(part, logps_BM, strict=False):
                    yield question, logps_M[: len(question.letters)]

    return weigh


def _lay_out(
    phrasing: Phrasing, style: PromptFormat, question: Question, prompt: str
) -> tuple[list[int], list[int]]:
    """The tokens before a letter, and each letter's own token."""
    answers = [phrasing.encode_answer(style, question, (x,)) for x in question.letters]
    before = {tuple(ids[:-1]) for ids in answers}
    last = [ids[-1] for ids in answers]
    if len(before) > 1 or len(set(last)) < len(last):
        raise UserError(
            f"question {question.id}: this tokenizer does not write each letter as one token of "
            "its own, so their likelihoods cannot be compared; use --no-likelihood"
        )
    return phrasing.encode(prompt) + list(before.pop()), last


def _stack(rows: Sequence[tuple[Question, list[int], list[int]]], widest: int) -> dict[str, Any]:
    length = -(-max(len(ids) for _, ids, _ in rows) // _ROUND) * _ROUND
    tokens_BT = np.zeros((len(rows), length), np.int32)
    segments_BT = np.zeros_like(tokens_BT)
    index_BM = np.zeros((len(rows), widest), np.int32)
    labels_BM = np.zeros_like(index_BM)
    for row, (_, ids, last) in enumerate(rows):
        tokens_BT[row, : len(ids)] = ids
        segments_BT[row, : len(ids)] = 1
        index_BM[row] = len(ids) - 1
        labels_BM[row, : len(last)] = last
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape)
    return {
        "tokens": tokens_BT,
        "segment_ids": segments_BT,
        "positions": positions_BT,
        "target_index": index_BM,
        "labels": labels_BM,
    }
