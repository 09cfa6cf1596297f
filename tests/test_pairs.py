"""Preference pairs: strict in, nothing cut, every response ends in end of text."""

import json

import numpy as np
import pytest

from rpo_jax.data.ledger import Ledger
from rpo_jax.data.pairs import Pair, read_pairs, tokenise_pairs
from rpo_jax.data.tokenizer import read_tokenizer, train_sentencepiece
from rpo_jax.errors import UserError

GOOD = {"id": "1", "prompt": "問題: どれか。\n答え:", "chosen": "\na", "rejected": "\nb"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(["abcdef abc\n" * 50], 268, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer):
    return read_tokenizer(qwen_tokenizer)


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_pairs_are_read_as_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD | {"judge": "exam key"}, GOOD | {"id": "2"})
    assert list(read_pairs([path])) == [Pair(**GOOD), Pair(**GOOD | {"id": "2"})]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ""}, "'chosen' is empty"),
        ({"rejected": " \n"}, "'rejected' is empty"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"chosen": None}, "field 'chosen' is None, a string is wanted"),
        ({"prompt": [{"role": "user"}]}, "field 'prompt' is .*, a string is wanted"),
        ({"rejected": "\na"}, "'chosen' and 'rejected' are the same text"),
        ({"id": "1"}, r"id '1' occurs twice, first at .*a\.jsonl:1"),
    ],
)
def test_broken_pairs_are_named(tmp_path, change, message):
    path = write(tmp_path / "a.jsonl", GOOD, GOOD | {"id": "2"} | change)
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}"):
        list(read_pairs([path]))


@pytest.mark.parametrize("name", list(GOOD))
def test_a_missing_field_is_named(tmp_path, name):
    path = write(tmp_path / "a.jsonl", {key: GOOD[key] for key in GOOD if key != name})
    with pytest.raises(UserError, match=rf"a\.jsonl:1: no field '{name}'; it has"):
        list(read_pairs([path]))


def test_ids_are_unique_over_files(tmp_path):
    paths = [write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", GOOD)]
    with pytest.raises(UserError, match=r"b\.jsonl:1: id '1' occurs twice, first at .*a\.jsonl:1"):
        list(read_pairs(paths))


def tokenise(pairs, tokenizer, prompt_length=8, response_length=4):
    ledger = Ledger("pairs")
    records = tokenise_pairs(
        pairs,
        tokenizer,
        prompt_length=prompt_length,
        response_length=response_length,
        ledger=ledger,
    )
    return list(records), ledger


def test_responses_end_in_end_of_text(tokenizer):
    (record,), ledger = tokenise([Pair("1", "ab", "c", "d")], tokenizer)
    assert record["id"] == "1"
    assert tokenizer.decode(record["prompt_ids"].tolist()) == "ab"
    for name, text in (("chosen_ids", "c"), ("rejected_ids", "d")):
        *ids, last = record[name].tolist()
        assert tokenizer.decode(ids) == text and last == tokenizer.eos_id
        assert record[name].dtype == np.int32
    prompt = len(tokenizer.encode("ab"))
    assert ledger.totals == {"prompt_tokens": prompt, "chosen_tokens": 2, "rejected_tokens": 2}


def test_no_token_crosses_the_border(qwen):
    (record,), _ = tokenise([Pair("1", "answer", " ing", "ing")], qwen)
    joined = [*record["prompt_ids"].tolist(), *record["rejected_ids"].tolist()[:-1]]
    assert joined != qwen.encode("answering") and qwen.decode(joined) == "answering"


def test_what_does_not_fit_is_told_not_cut(tokenizer):
    pairs = [
        Pair("fits", "a b c d ", "eee", "fff"),
        Pair("prompt", "ffffffffff", "e", "f"),
        Pair("chosen", "a", "ffff", "f"),
        Pair("rejected", "a", "f", "fffff"),
        Pair("rejected too", "a", "f", "ffffff"),
    ]
    records, ledger = tokenise(pairs, tokenizer)
    assert [record["id"] for record in records] == ["fits"]
    assert len(records[0]["prompt_ids"]) == 8 and len(records[0]["chosen_ids"]) == 4
    told = {reason: (d.count, d.example, d.largest) for reason, d in ledger.dropped.items()}
    assert told == {
        "prompt longer than data.prompt_length=8 tokens": (1, "prompt", 10),
        "chosen longer than data.response_length=4 tokens": (1, "chosen", 5),
        "rejected longer than data.response_length=4 tokens": (2, "rejected", 7),
    }
    assert ledger.dropped_share == 0.8


def test_responses_with_the_same_tokens_are_no_preference(qwen):
    composed, decomposed = (
        "\u304c",
        "\u304b\u3099",
    )  # one syllable in two spellings; Qwen folds them
    records, ledger = tokenise([Pair("1", "a", composed, decomposed)], qwen)
    assert not records
    assert ledger.dropped["chosen and rejected have the same tokens"].example == "1"
