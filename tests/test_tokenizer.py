"""Tokenizers: text survives the round trip, and nothing but us ends a document."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_jax.data.tokenizer import Tokenizer, read_tokenizer, train_sentencepiece
from rpo_jax.errors import UserError

TEXTS = [
    f"架空の{name}症では{sign}がみられる。\n問題: {name}症の所見はどれか。\na: {sign}\n答え: a\n"
    for name in ("ユケリ", "ポペメ", "グキシ", "メワト", "ゾネゴ", "ケトポ")
    for sign in ("斑", "反射", "腫", "徴候", "音", "fever  of 39 degrees")
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
# What has bitten: spaces, line ends, the space mark of SentencePiece, bytes, look-alike pieces.
HARD = [
    "",
    " ",
    "  a  b ",
    "\n\n x\r\n\t",
    "▁x ▁▁",
    "\0\x01",
    "<unk>",
    "<0x41>",
    "\ufeff",
    "🎉\u2028",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    return train_sentencepiece(TEXTS, 320, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer) -> Tokenizer:
    return read_tokenizer(qwen_tokenizer)


@pytest.fixture(params=["small", "qwen"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_sentencepiece_round_trip(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(0 <= i < small.vocab_size for i in ids) and small.eos_id not in ids


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_qwen_round_trip(qwen, text):
    text = unicodedata.normalize("NFC", text)  # that is what this tokenizer reads
    ids = qwen.encode(text)
    assert qwen.decode(ids) == text
    assert all(0 <= i < qwen.vocab_size for i in ids) and qwen.eos_id not in ids


@pytest.mark.parametrize("text", HARD)
def test_hard_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_literal_end_of_text_ends_nothing(tokenizer):
    text = "前<|endoftext|>後"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


def test_no_control_token_of_qwen_comes_from_text(qwen):
    assert max(qwen.encode("<|im_start|>user<|im_end|><|endoftext|>")) < 151643


def test_qwen_is_the_one_of_the_release(qwen):
    assert (qwen.vocab_size, qwen.eos_id, qwen.eos_token) == (151665, 151643, "<|endoftext|>")
    assert qwen.decode([*qwen.encode("答え: c"), qwen.eos_id]) == "答え: c<|endoftext|>"


def test_training_is_deterministic_and_fills_the_vocabulary(small, tmp_path):
    again = train_sentencepiece(iter(TEXTS), 320, tmp_path)
    assert again.fingerprint == small.fingerprint
    assert small.vocab_size == 320 and small.eos_token == "<|endoftext|>"
    assert len(small.encode(TEXTS[0])) < len(TEXTS[0])


def test_long_lines_are_not_skipped(tmp_path):
    line = "".join(TEXTS).replace("\n", "") * 20
    assert len(line.encode()) > 4192
    assert train_sentencepiece([line], 320, tmp_path).vocab_size == 320


def test_a_saved_copy_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert (tmp_path / tokenizer.file_name).read_bytes() == tokenizer.content
    assert read_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_the_chosen_end_of_text_is_kept_and_told_apart(qwen, qwen_tokenizer, tmp_path):
    other = read_tokenizer(qwen_tokenizer, "<|im_end|>")
    assert (other.eos_id, other.eos_token) == (151645, "<|im_end|>")
    assert other.fingerprint != qwen.fingerprint
    other.save(tmp_path)
    assert read_tokenizer(tmp_path).eos_id == 151645
    assert read_tokenizer(tmp_path, "<|endoftext|>").eos_id == 151643


def test_end_of_text_as_hugging_face_states_it(qwen, tmp_path):
    qwen.save(tmp_path)
    stated = {"eos_token": {"content": "<|im_end|>", "special": True}, "model_max_length": 4096}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    assert read_tokenizer(tmp_path).eos_token == "<|im_end|>"


def test_qwen_errors_name_file_and_tokens(qwen_tokenizer):
    with pytest.raises(UserError, match=r"no token '<\|endoftxt\|>'.*close: <\|endoftext\|>"):
        read_tokenizer(qwen_tokenizer, "<|endoftxt|>")
    with pytest.raises(UserError, match="'the' is an ordinary token"):
        read_tokenizer(qwen_tokenizer, "the")


def test_sentencepiece_errors_name_file_and_tokens(small, tmp_path):
    small.save(tmp_path)
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=r"tokenizer\.model: no token '</s>'.*<\|endoftext\|>"):
        read_tokenizer(path, "</s>")


@pytest.mark.parametrize("content", [b"", b"{}", b"{broken", b"not a tokenizer", b"\xff\xfe\0"])
def test_what_is_no_tokenizer_is_said_so(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: (not|neither)"):
        read_tokenizer(path)


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such tokenizer file"):
        read_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 400, "no text"),
        (["abc\n"], 400, r"too small; set tokenizer\.train_vocab_size to at most 2\d\d"),
        (["".join(map(chr, range(0x4E00, 0x4F00)))] * 9, 300, r"characters alone need .* at least"),
    ],
)
def test_text_that_does_not_fit_the_vocabulary(tmp_path, texts, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(texts, vocab_size, tmp_path / "model")
    assert not (tmp_path / "model").exists()
