"""Documents: read as they are, complained about with file and line, counted."""

import gzip
import json

import pytest

from rpo_jax.data import files
from rpo_jax.data.corpus import SUFFIXES, read_documents
from rpo_jax.data.files import Span, digest_files, find_files, survey_file
from rpo_jax.data.ledger import Ledger
from rpo_jax.errors import UserError


def write(path, text):
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(*paths):
    spans = [Span(str(path)) for path in paths]
    return [(d.id, d.text) for span in spans for d in read_documents(span)]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_jsonl_and_txt(tmp_path, ending):
    lines = '{"id": "x", "text": "一\\n二"}\n\n{"text": "三", "more": 1}\n'
    one = write(tmp_path / f"a.jsonl{ending}", lines)
    two = write(tmp_path / f"b.txt{ending}", "\ufeff四\n五\n")
    assert read(one, two) == [
        ("x", "一\n二"),
        (f"a.jsonl{ending}#3", "三"),
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


def write_parquet(path, rows, columns=("text", "id"), **options):
    pyarrow = pytest.importorskip("pyarrow", reason="wants the `corpus` extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {name: [row.get(name) for row in rows] for name in columns}
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_and_zst(tmp_path):
    rows = [{"text": "か\u3099", "id": "x"}, {"text": "二"}]
    one = write_parquet(tmp_path / "a.parquet", rows)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("三", "四"))
    two = tmp_path / "b.jsonl.zst"
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.CompressedOutputStream(str(two), "zstd") as file:
        file.write(lines.encode())
    assert read(one, two) == [
        ("x", "が"),
        ("a.parquet#2", "二"),
        ("b.jsonl.zst#1", "三"),
        ("b.jsonl.zst#2", "四"),
    ]
    two.write_bytes(two.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"b\.jsonl\.zst: cannot be read"):
        read(two)


def test_a_bad_parquet_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"body": "x"}], columns=("body", "title"))
    with pytest.raises(
        UserError, match=r"a\.parquet: no column 'text' or 'id'; it has body, title"
    ):
        read(path)
    path = write_parquet(tmp_path / "b.parquet", [{"id": "x"}], columns=("id",))
    with pytest.raises(UserError, match=r"b\.parquet: row 1: no field 'text'; it has id"):
        read(path)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read"):
        read(path)


def test_other_names_for_the_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "一", "key": "x"}')
    (document,) = read_documents(Span(str(path)), "body", "key")
    assert (document.id, document.text, document.where) == ("x", "一", f"{path}:1")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("span_bytes", [1, 20, 100, 10**6])
def test_a_file_in_pieces_is_the_file(tmp_path, monkeypatch, ending, span_bytes):
    monkeypatch.setattr(files, "_BLOCK", 7)
    texts = [f"{'長い' * (i % 7)} {i}" for i in range(40)]
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        write(path, "\n".join(json.dumps({"text": text}) for text in texts))
    else:
        write_parquet(path, [{"text": text} for text in texts], row_group_size=3)
    facts, spans = survey_file(path, span_bytes)
    assert facts == digest_files([path])[0]
    found = [(d.id, d.text) for span in spans for d in read_documents(span)]
    assert found == [(f"a.{ending}#{i}", text) for i, text in enumerate(texts, start=1)]
    assert len(spans) == 1 if span_bytes == 10**6 else len(spans) > 1


def test_a_document_that_is_no_document(tmp_path, monkeypatch):
    for module in ("files", "corpus"):
        monkeypatch.setattr(f"rpo_jax.data.{module}.MOST_BYTES", 2**20)
    text = "長" * 2**20
    for path in (
        write(tmp_path / "a.txt", text),
        write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False)),
        write_parquet(tmp_path / "a.parquet", [{"text": text}]),
    ):
        with pytest.raises(UserError, match=rf"{path}.*: a document of more than 1 MiB; cut it"):
            read(path)


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
