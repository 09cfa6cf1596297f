"""Greedy completions and chat prompts against transformers'."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.chat import read_chat
from rpo_jax.data.tokenizer import Tokenizer, read_tokenizer
from rpo_jax.exams.igakuqa import read_demonstrations, read_questions
from rpo_jax.exams.prompts import EXPLAIN_ZERO_SHOT_V1, OFFICIAL_V1
from rpo_jax.generation.batching import make_generate
from rpo_jax.generation.requests import Request, Settings
from rpo_jax.model.qwen2 import Network
from rpo_jax.model.shape import ModelShape
from rpo_jax.sharding.mesh import make_mesh
from tests.test_chat import CHATML

torch = pytest.importorskip("torch", reason="parity needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="parity needs the `parity` extra")
from tests.parity.test_qwen2_transformers import BASE, hf_model, to_params, vary  # noqa: E402

pytestmark = pytest.mark.full

ROWS, NEW, NEAR_TIE = 32, 64, 1e-4


def complete_theirs(model: Any, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, new] and the gap between the two best logits of each."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(out.logits, dim=1).topk(2).values
    return out.sequences[:, longest:].numpy(), (best[..., 0] - best[..., 1]).numpy()


def complete_ours(
    shape: ModelShape, model: Any, prompts: list[list[int]], end: int, **options: Any
) -> list[tuple[int, ...]]:
    params = to_params(shape, dict(model.named_parameters()))
    tokenizer = Tokenizer(
        shape.vocab_size, end, "", b"", "", {}, lambda _: [], lambda ids: " ".join(map(str, ids))
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    call = make_generate(Network(shape), mesh, tokenizer, **options)
    settings = Settings(max_tokens=NEW)
    requests = [Request(str(i), p, settings=settings) for i, p in enumerate(prompts)]
    done = {completion.id: completion.token_ids for completion in call(params, requests)}
    return [done[str(i)] for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        (BASE, 0),
        (vary(hidden_size=384, num_attention_heads=6, tie_word_embeddings=True), 40),
    ],
    ids=["untied-4q2kv", "tied-6q2kv-shared-prefix"],
)
def test_greedy_completions_are_those_of_transformers(shape: ModelShape, shared: int) -> None:
    rng = np.random.default_rng(0)
    common = rng.integers(1, shape.vocab_size, shared).tolist()
    prompts = [
        common + rng.integers(1, shape.vocab_size, n).tolist() for n in rng.integers(1, 97, ROWS)
    ]
    model = hf_model(shape)
    tokens, gaps = complete_theirs(model, prompts)
    # The token that ends the most even share of the rows; the others write all they may.
    holders = [(tokens == token).any(axis=1).sum() for token in range(shape.vocab_size)]
    end = int(np.argmin(np.abs(np.array(holders) - ROWS / 2)))
    got = complete_ours(shape, model, prompts, end, slots=12, chunk=32)
    compared, ended = 0, 0
    for row, (want, gap, ours) in enumerate(zip(tokens, gaps, got, strict=True)):
        stop = np.flatnonzero(want == end)
        length = stop[0] + 1 if stop.size else NEW
        differs = [i for i, (a, b) in enumerate(zip(want[:length], ours, strict=False)) if a != b]
        if differs:  # then all that follows may differ
            assert gap[differs[0]] < NEAR_TIE, (row, differs[0], gap[differs[0]])
            length = differs[0]
        else:
            assert len(ours) == length
            ended += bool(stop.size)
        compared += length
    assert 0 < ended < ROWS and compared > ROWS * NEW / 3


def test_chat_prompts_are_those_of_transformers(
    tmp_path: Path, qwen_tokenizer: Path, igakuqa_dir: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(qwen_tokenizer.read_bytes())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours, chat = read_tokenizer(tmp_path), read_chat(tmp_path)
    assert chat is not None and ours.eos_token == "<|im_end|>"
    shots = read_demonstrations(igakuqa_dir)
    for question in read_questions(igakuqa_dir, [2022])[::40]:
        for style, shown in ((OFFICIAL_V1, shots), (EXPLAIN_ZERO_SHOT_V1, [])):
            messages = style.messages(question, shown)
            want = theirs.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert ours.encode_marked(chat.render(messages, ours)) == want
