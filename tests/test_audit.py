"""The audit of control tokens tells the two mistakes, and nothing else."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from rpo_jax.data.tokenizer import read_tokenizer
from rpo_jax.model.qwen2 import init_params
from rpo_jax.training.audit import audit_control_tokens
from tests.tiny import NETWORK

LETTERS = "abcdefghijklmnopqrstuvwxyz<|>_."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Letters, and two control tokens."""
    made = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="."))
    made.pre_tokenizer = Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(
        [AddedToken("<|endoftext|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    folder = tmp_path_factory.mktemp("letters")
    made.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder)


@pytest.fixture(scope="module")
def params():
    return init_params(NETWORK, jax.random.key(0))


def pair(tokenizer, prompt="a b c", chosen="yes", rejected="no"):
    ids = {name: tokenizer.encode(text) for name, text in
           {"prompt": prompt, "chosen": chosen, "rejected": rejected}.items()}  # fmt: skip
    for name in ("chosen", "rejected"):
        ids[name].append(tokenizer.eos_id)
    return {f"{name}_ids": np.array(value, np.int32) for name, value in ids.items()}


def test_sound_records_and_weights_are_only_counted(tokenizer, params, caplog):
    with caplog.at_level(logging.INFO):
        assert audit_control_tokens(tokenizer, [pair(tokenizer)] * 3, params) == []
    assert "<|endoftext|> (6 times)" in caplog.text and "im_end" not in caplog.text


def test_a_spelt_control_token_is_told_with_its_record(tokenizer, params, caplog):
    records = [pair(tokenizer), pair(tokenizer, chosen="yes<|im_end|>")]
    (warning,) = audit_control_tokens(tokenizer, records, params)
    assert "record 1" in warning and "'<|im_end|>'" in warning and "chosen_ids" in warning
    assert warning in caplog.text


@pytest.mark.parametrize("table", ["embed", "head"])
def test_an_untrained_row_is_told(tokenizer, params, table):
    rows = params[table]["table"]
    tiny = {**params, table: {"table": rows.at[tokenizer.eos_id].multiply(0.01)}}
    (warning,) = audit_control_tokens(tokenizer, [pair(tokenizer)], tiny)
    assert "'<|endoftext|>'" in warning and {"embed": "embedding", "head": "head"}[table] in warning
    unused = {**params, table: {"table": rows.at[tokenizer.eos_id + 1].multiply(0.01)}}
    assert audit_control_tokens(tokenizer, [pair(tokenizer)], unused) == []


def test_text_records_are_read_without_their_padding(tokenizer, params):
    ids = [*tokenizer.encode("abc"), tokenizer.eos_id]
    record = {
        "tokens": np.array([*ids, 0, 0], np.int32),
        "segment_ids": np.array([1] * len(ids) + [0, 0], np.int32),
    }
    zeros = {**params, "embed": {"table": jnp.asarray(params["embed"]["table"]).at[0].set(0.0)}}
    assert len(LETTERS) < tokenizer.vocab_size <= NETWORK.shape.vocab_size
    record["tokens"][0] = 1
    assert audit_control_tokens(tokenizer, [record], zeros) == []


def test_many_warnings_are_told_in_short(tokenizer, params, caplog):
    records = [pair(tokenizer, rejected="<|im_end|>")] * 9
    assert len(audit_control_tokens(tokenizer, records, params)) == 9
    # Warnings alone: whether the summary before them is seen depends on the level of the logger.
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 6 and told[-1] == "4 more such records"
