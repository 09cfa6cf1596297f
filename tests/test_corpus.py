"""Documents: read as they are, complained about with file and line, counted."""

import gzip
import json

import pytest

from rpo_jax.data.corpus import SUFFIXES, read_documents, tokenise_documents
from rpo_jax.data.files import digest_files, find_files
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.tokenizer import train_sentencepiece
from rpo_jax.errors import UserError


def write(path, text):
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(*paths):
    return [(document.id, document.text) for document in read_documents(paths)]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_jsonl_and_txt(tmp_path, ending):
    lines = '{"id": "x", "text": "一\\n二"}\n\n{"text": "三", "more": 1}\n'
    one = write(tmp_path / f"a.jsonl{ending}", lines)
    two = write(tmp_path / f"b.txt{ending}", "\ufeff四\n五\n")
    assert read(one, two) == [
        ("x", "一\n二"),
        (f"a.jsonl{ending}#2", "三"),
        (f"b.txt{ending}", "四\n五\n"),
    ]


def test_text_becomes_nfc(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "か\u3099ｶﾞ①"}))
    assert read(path) == [("a.jsonl#1", "がｶﾞ①")]  # composed, and nothing else is folded


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": "b"\n', r"a\.jsonl:2: not a JSON object"),
        ("a.jsonl", GOOD + b"\n" + b'["text"]\n', r"a\.jsonl:3: list, a JSON object is wanted"),
        ("a.jsonl", GOOD + '{"text": "架"}'.encode("euc-jp"), r"a\.jsonl:2: not UTF-8 \(byte 10"),
        (
            "a.jsonl",
            GOOD + b'{"body": "b", "id": "c"}',
            r"a\.jsonl:2: no field 'text'; it has body",
        ),
        ("a.jsonl", GOOD + b'{"text": null}', r"a\.jsonl:2: field 'text' is None, a string"),
        ("a.jsonl", GOOD + b'{"text": "b", "id": 3}', r"a\.jsonl:2: field 'id' is 3, a string"),
        ("a.jsonl", GOOD + b'{"text": "b\\ud83d"}', r"a\.jsonl:2: .*half a character.* at 1"),
        ("a.txt", "架空".encode("shift-jis"), r"a\.txt: not UTF-8"),
    ],
)
def test_broken_input_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read(path)
    with pytest.raises(UserError, match=message.replace(r"a\.", r"b\.a\.")):
        read(write(tmp_path / f"b.{name}", content))


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", GOOD * 1000)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
        read(path)


def test_files_are_found_in_order_each_once(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.txt.gz"):
        write(tmp_path / name, "")
    patterns = (str(tmp_path / "**" / "*.*"), str(tmp_path / "a.jsonl"))
    found = find_files(patterns, SUFFIXES, "data.train")
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "c.txt.gz"]


def test_patterns_that_find_nothing_good_are_named(tmp_path):
    write(tmp_path / "a.csv", "x")
    with pytest.raises(UserError, match=r"data\.train: no file matches '.*/nothing\*'"):
        find_files((str(tmp_path / "nothing*"),), SUFFIXES, "data.train")
    with pytest.raises(UserError, match=r"data\.train: .*a\.csv: cannot be read; \.jsonl or \.txt"):
        find_files((str(tmp_path / "*"),), SUFFIXES, "data.train")


def test_digests_follow_the_content(tmp_path):
    one, two = write(tmp_path / "a.txt", "x"), write(tmp_path / "b.txt", "x")
    first, second = digest_files([one, two])
    assert first["sha256"] == second["sha256"] and first["bytes"] == 1
    assert digest_files([write(one, "y")])[0]["sha256"] != first["sha256"]


def test_documents_end_in_end_of_text_and_empty_ones_are_counted(tmp_path):
    tokenizer = train_sentencepiece(["abcdef abc\n" * 50], 268, tmp_path / "tokenizer")
    texts = ["abc", "", " \n", "def<|endoftext|>abc"]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    ledger = Ledger("documents")
    documents = list(tokenise_documents(read_documents([path]), tokenizer, ledger))
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in documents] == [texts[0], texts[3]]
    for ids in documents:
        assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
    assert ledger.kept == 2 and ledger.dropped["empty"].count == 2
    assert ledger.dropped["empty"].example == "a.jsonl#2"
    assert ledger.totals == {"tokens": sum(map(len, documents)), "characters": 22}


def test_the_ledger_reads_well_and_is_stored_whole():
    ledger = Ledger("pairs")
    for number in range(1998):
        ledger.keep(tokens=number)
    ledger.drop("prompt too long", "p1", 400)
    ledger.drop("prompt too long", "p2", 600)
    assert str(ledger) == (
        "1,998 pairs kept, 2 dropped (0.10%)\n  2 prompt too long, the largest 600; the first: p1"
    )
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger
    assert Ledger("pairs").dropped_share == 0.0
