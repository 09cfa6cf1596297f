"""Text record sets: the same bytes however they are made, every document accounted for."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from rpo_jax.config import Corpus, Data
from rpo_jax.data.files import find_files
from rpo_jax.data.local import find_sets, make_sets
from rpo_jax.data.overlap import index_questions
from rpo_jax.data.records import open_records
from rpo_jax.data.screening import Collection
from rpo_jax.data.textplan import make_plan
from rpo_jax.data.tokenizer import read_tokenizer, train_sentencepiece
from rpo_jax.errors import UserError

# What DirectRunner runs on here, without asking the network for another one first.
RUNNER = ["--runner=FnApiRunner"]
QUESTION = "架空の病に倒れた患者に最初に与える薬はどれか、次の中から一つ選びなさい。"
LETTERS = [chr(code) for code in range(0x3042, 0x3082)] + list("病薬痛熱、。")


def make_text(rng, length):
    return "".join(rng.choices(LETTERS, k=length))


def write_lines(path, texts):
    """Documents in lines of 4 kB, so that a few hundred make several parts and shards."""
    for i, text in enumerate(texts):
        record = {"id": f"{path.name[0]}{i}", "text": text, "more": "x" * 4000}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def tokenizer(make_once):
    rng = random.Random(0)
    texts = [make_text(rng, 500) for _ in range(20)]
    folder = make_once("text-sets-tokenizer", lambda f: train_sentencepiece(texts, 500, f))
    return read_tokenizer(folder)


@pytest.fixture(scope="module")
def corpus(make_once):
    """Two sources and held-out text, with all that can be wrong with a document."""

    def build(folder):
        rng = random.Random(1)
        medical = [make_text(rng, rng.randrange(20, 400)) for _ in range(500)]
        near = medical[7][:200] + "変" + medical[7][200:] + make_text(rng, 3)
        medical += [medical[3], medical[3] + "", " ", "短い", "あ" * 300, near]
        medical += [make_text(rng, 100) + QUESTION, "english words only " * 9]
        general = [make_text(rng, rng.randrange(20, 400)) for _ in range(200)]
        general += [medical[5], "広告\n" + general[0] + "\n広告: これ\n"]
        held = [make_text(rng, 200) for _ in range(20)]
        general.append(held[0])
        write_lines(folder / "medical.jsonl", medical)
        write_lines(folder / "general.jsonl", general)
        write_lines(folder / "held.jsonl", held)

    return make_once("text-sets-corpus", build)


FILTERS = Corpus(
    heldout_share=0.05,
    min_characters=10,
    min_kana_share=0.2,
    max_repetition=0.5,
    boilerplate_lines=("^広告",),
    near_copies=0.8,
    epochs=(1.5, 0.5),
    shard_mib=1,
)


def plan_of(corpus, tokenizer, names=("medical", "general"), workers=1, **changes):
    data = Data(row_length=64, workers=workers, corpus=replace(FILTERS, **changes))
    sources = {
        Collection(name, split): find_files([str(corpus / f"{name}.*")], (".jsonl",), "data.train")
        for split, names in (("train", names), ("heldout", ["held"]))
        for name in names
    }
    return make_plan(data, tokenizer, index_questions({"q1": [QUESTION]}), sources)


def read_bytes(found):
    """Every record file and card, by split and name."""
    return {
        (split, path.name): path.read_bytes()
        for split, folder in found.items()
        for path in folder.iterdir()
    }


@pytest.fixture(scope="module")
def made(corpus, tokenizer, make_once):
    plan = plan_of(corpus, tokenizer)
    folder = make_once("text-sets-made", lambda folder: make_sets(plan, folder))
    return find_sets(plan, folder)


def decode(directory, tokenizer):
    """The documents of a record set by id, with the number of times that each is there."""
    pieces = {}
    for row in open_records(directory):
        for segment, name in enumerate(row["documents"].split("\n"), start=1):
            piece = row["tokens"][row["segment_ids"] == segment].tolist()
            pieces.setdefault(name, []).append(piece)
    return {
        name: [tokenizer.decode(ids) for ids in join(p, tokenizer)] for name, p in pieces.items()
    }


def join(pieces, tokenizer):
    """Token ids of each copy of a document, which its end of text ends."""
    ends = [piece[-1] == tokenizer.eos_id for piece in pieces]
    if sum(ends) == 1:  # best fit puts them in any order
        pieces = sorted(pieces, key=lambda piece: piece[-1] == tokenizer.eos_id)
    copies = [[]]
    for piece in pieces:
        assert tokenizer.eos_id not in piece[:-1]
        copies[-1].extend(piece)
        if piece[-1] == tokenizer.eos_id:
            copies.append([])
    assert copies.pop() == [] and len(copies) == sum(ends)
    return [ids[:-1] for ids in copies]


def test_every_document_is_kept_or_accounted_for(made, corpus, tokenizer):
    infos = {split: open_records(folder).info for split, folder in made.items()}
    train, held = infos["train"]["ledger"], infos["heldout"]["ledger"]
    reasons = {
        name: entry["count"] + held["dropped"].get(name, {"count": 0})["count"]
        for name, entry in (held["dropped"] | train["dropped"]).items()
    }
    drawn = reasons.pop("not drawn (data.corpus.epochs, weights)")
    assert reasons == {
        "empty": 1,
        "shorter than data.corpus.min_characters=10": 1,
        "repetition above data.corpus.max_repetition=0.5": 1,
        "kana below data.corpus.min_kana_share=0.2": 1,
        "holds a question of the evaluation": 1,
        "the same text as another document": 4,
        "like another document (data.corpus.near_copies=0.8)": 2,
    }
    assert 70 < drawn < 130
    found = {split: decode(folder, tokenizer) for split, folder in made.items()}
    assert not found["train"].keys() & found["heldout"].keys()
    everything = 508 + 203 + 20
    distinct = len(found["train"]) + len(found["heldout"])
    assert distinct + drawn + sum(reasons.values()) == everything
    # Held-out files are kept whole, and what they hold is not trained on.
    assert {f"h{i}" for i in range(20)} <= found["heldout"].keys()
    assert "g202" not in found["train"]
    assert 0.03 < (len(found["heldout"]) - 20) / distinct < 0.07
    texts = {}
    for name in ("medical", "general", "held"):
        for line in (corpus / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            texts[record["id"]] = record["text"]
    for split in found:
        for name, copies in found[split].items():
            assert set(copies) == {texts[name]}, name
    twice = sum(len(copies) == 2 for copies in found["train"].values())
    medical = [name for name in found["train"] if name.startswith("m")]
    assert 0.4 < twice / len(medical) < 0.6
    assert all(len(copies) == 1 for copies in found["heldout"].values())


def test_what_is_said_of_a_set(made):
    info = open_records(made["train"]).info
    contact = info["questions"]["contacts"]["q1"]
    assert contact["documents"] == 1 and contact["share"] == 1.0
    assert "medical.jsonl:507" in contact["example"]
    totals = info["ledger"]["totals"]
    assert sum(source["tokens"] for source in info["sources"]) == totals["tokens"]
    assert [source["passes"] for source in info["sources"]] == [1.5, 0.5]
    assert totals["tokens"] / (info["records"] * 64) > 0.99
    card = (made["train"] / "card.md").read_text()
    assert f"{totals['tokens']:,} tokens" in card and "| q1 | 1 | 1.00 |" in card
    assert "1 holds a question of the evaluation; the first: " in card
    assert info["samples"][0]["text"] in card
    builder = tfds.builder_from_directory(made["train"])
    assert len(builder.as_data_source("records")) == info["records"]


def test_boilerplate_lines_are_taken_out(corpus, tokenizer, tmp_path):
    plan = plan_of(corpus, tokenizer, ("general",), epochs=(), near_copies=0.0, heldout_share=0.0)
    found = make_sets(plan, tmp_path)
    texts = decode(found["train"], tokenizer)
    # Without its two lines this one is a copy but for the end of its line.
    assert texts["g201"] == [texts["g0"][0] + "\n"]


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_makes_the_same_bytes(made, corpus, tokenizer, tmp_path, workers):
    found = make_sets(plan_of(corpus, tokenizer, workers=workers), tmp_path)
    assert read_bytes(found) == read_bytes(made)


@pytest.mark.full
def test_beam_makes_the_same_bytes(made, corpus, tokenizer, tmp_path):
    pytest.importorskip("apache_beam", reason="wants the `beam` extra")
    from rpo_jax.data.beam import make_sets_with_beam

    found = make_sets_with_beam(plan_of(corpus, tokenizer), tmp_path, RUNNER)
    assert read_bytes(found) == read_bytes(made)
    assert sorted(tmp_path.iterdir()) == sorted(found.values())


def test_which_file_a_document_comes_in_does_not_matter(made, corpus, tokenizer, tmp_path):
    """What a document says and which source it is of decide; not the file that it came in."""
    lines = (corpus / "medical.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "medical.1.jsonl").write_text("".join(lines[:200]))
    (tmp_path / "medical.2.jsonl").write_text("".join(lines[200:]))
    for name in ("general", "held"):
        (tmp_path / f"{name}.jsonl").write_bytes((corpus / f"{name}.jsonl").read_bytes())
    found = make_sets(plan_of(tmp_path, tokenizer), tmp_path / "out")
    for split, folder in found.items():
        for name in open_records(folder).info["shards"]:
            assert (folder / name).read_bytes() == (made[split] / name).read_bytes()


def test_weights_are_shares_of_what_is_trained_on(corpus, tokenizer, tmp_path):
    changes = {"epochs": (), "weights": (0.5, 0.5), "heldout_share": 0.0, "near_copies": 0.0}
    found = make_sets(plan_of(corpus, tokenizer, **changes), tmp_path)
    one, two = open_records(found["train"]).info["sources"]
    assert two["passes"] == pytest.approx(1.0) and one["passes"] < 0.5
    assert one["characters"] / two["characters"] == pytest.approx(1.0, abs=0.1)


REPO = Path(__file__).parents[1]
PROGRAM = """
import pickle, sys
from pathlib import Path
from rpo_jax.data.local import make_sets
if __name__ == "__main__":
    make_sets(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(made, corpus, tokenizer, tmp_path):
    plan = plan_of(corpus, tokenizer, workers=2)
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    script = tmp_path / "run.py"
    script.write_text(PROGRAM)
    words = [sys.executable, str(script), str(tmp_path / "plan"), str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 900
    while not list(tmp_path.glob("out/*.unfinished/part-*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=900)  # the workers, who share its output, leave with it
    (work,) = (tmp_path / "out").iterdir()
    assert work.name.endswith(".unfinished")
    for folder in work.glob("*-train"):
        (folder / ".shard-left").mkdir()  # as by a kill while a shard is written
    before = {path: path.stat().st_mtime_ns for path in work.glob("part-*.json")}
    assert before
    found = make_sets(replace(plan, data=replace(plan.data, workers=1)), tmp_path / "out")
    assert read_bytes(found) == read_bytes(made)
    assert sorted((tmp_path / "out").iterdir()) == sorted(found.values())
    assert not [path for folder in found.values() for path in folder.glob(".*")]


@pytest.fixture
def clashing(corpus, tmp_path):
    """The corpus with two ids that come again, the first of them in a document to be left out."""
    lines = {
        name: (corpus / f"{name}.jsonl").read_text().splitlines(keepends=True)
        for name in ("medical", "general", "held")
    }
    lines["medical"].append('{"id": "m9", "text": " "}\n')
    lines["general"].insert(3, '{"id": "m8", "text": "別の文書"}\n')
    lines["held"].append('{"id": "m7", "text": "ほかの組のもの"}\n')  # is of another split
    folder = tmp_path / "clashing"
    folder.mkdir()
    for name in lines:
        (folder / f"{name}.jsonl").write_text("".join(lines[name]))
    return folder


def name_both(folder):
    """Of two clashes the one that comes first in the input."""
    one, two = (re.escape(f"{folder}/medical.jsonl:{line}") for line in (10, 509))
    return f"^{two}: id 'm9' occurs twice, first at {one}; name .*data.corpus.id_field=''\\)$"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_id_names_one_document(clashing, tokenizer, tmp_path, workers):
    with pytest.raises(UserError, match=name_both(clashing)):
        make_sets(plan_of(clashing, tokenizer, workers=workers), tmp_path / "out")
    (work,) = (tmp_path / "out").iterdir()  # nothing but what was read
    assert work.name.endswith(".unfinished") and list(work.glob("part-*.json"))


def test_documents_may_be_named_by_file_and_line(clashing, tokenizer, tmp_path):
    found = make_sets(plan_of(clashing, tokenizer, ("general",), epochs=(), id_field=""), tmp_path)
    names = decode(found["train"], tokenizer).keys()
    assert names and all(name.startswith("general.jsonl#") for name in names)


@pytest.mark.full
def test_beam_complains_alike(clashing, tokenizer, tmp_path):
    pytest.importorskip("apache_beam", reason="wants the `beam` extra")
    from rpo_jax.data.beam import make_sets_with_beam

    with pytest.raises(UserError, match=name_both(clashing)):
        make_sets_with_beam(plan_of(clashing, tokenizer), tmp_path / "1", RUNNER)
    with (clashing / "general.jsonl").open("a") as file:
        file.write('{"text": \n')
    with pytest.raises(UserError, match=r"general\.jsonl:205: not a JSON object \(.*\)$"):
        make_sets_with_beam(plan_of(clashing, tokenizer), tmp_path / "2", RUNNER)


def keep_unfinished(remove):
    return lambda path, **options: None if "unfinished" in str(path) else remove(path, **options)


def test_bad_input_costs_only_the_part_that_holds_it(corpus, tokenizer, tmp_path):
    for name in ("medical", "general", "held"):
        (tmp_path / f"{name}.jsonl").write_bytes((corpus / f"{name}.jsonl").read_bytes())
    good = (tmp_path / "general.jsonl").read_bytes()
    (tmp_path / "general.jsonl").write_bytes(good + b'{"text": \n')
    with pytest.raises(UserError, match=r"general\.jsonl:204: not a JSON object"):
        make_sets(plan_of(tmp_path, tokenizer), tmp_path / "out")
    (work,) = (tmp_path / "out").iterdir()
    kept = {path: path.stat().st_mtime_ns for path in work.glob("part-*.json")}
    assert kept
    (tmp_path / "general.jsonl").write_bytes(good)
    plan = plan_of(tmp_path, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpo_jax.data.local.shutil.rmtree", keep_unfinished(shutil.rmtree))
        make_sets(plan, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_full_disk_costs_only_what_was_being_written(made, corpus, tokenizer, tmp_path):
    """Files may have 60 kB, too little for a part, then 200 kB, too little for a shard."""
    plan = plan_of(corpus, tokenizer)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = []
    for most in (60_000, 280_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited[1]))
        try:
            with pytest.raises(UserError, match=r"unfinished: .*; finished parts are kept"):
                make_sets(plan, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        (work,) = tmp_path.iterdir()
        kept.append(len(list(work.glob("part-*.json"))))
    assert kept == [0, len(plan.parts)]
    assert read_bytes(make_sets(plan, tmp_path)) == read_bytes(made)


def test_too_much_filtered_stops(corpus, tokenizer, tmp_path):
    plan = plan_of(corpus, tokenizer, min_characters=350, max_filtered_share=0.5)
    with pytest.raises(UserError) as stopped:
        make_sets(plan, tmp_path)
    assert "left out, more than data.corpus.max_filtered_share=0.5" in str(stopped.value)
    assert "shorter than data.corpus.min_characters=350, the largest 349" in str(stopped.value)


def test_what_a_mixture_has_no_place_for_is_not_lost(corpus, tokenizer, tmp_path):
    changes = {"near_copies": 0.0, "heldout_share": 0.0, "max_filtered_share": 0.1}
    plan = plan_of(corpus, tokenizer, epochs=(), weights=(0.02, 0.98), **changes)
    ledger = open_records(make_sets(plan, tmp_path)["train"]).info["ledger"]
    drawn = ledger["dropped"]["not drawn (data.corpus.epochs, weights)"]
    assert drawn["count"] > 400 > ledger["kept"]


def test_long_documents_are_cut_as_the_config_says(corpus, tokenizer, tmp_path):
    changes = {"epochs": (), "heldout_share": 0.0, "near_copies": 0.0, "max_filtered_share": 1.0}
    rows: dict[str, dict[str, list[str]]] = {}
    for choice in ("continue", "best_fit", "drop"):
        plan = plan_of(corpus, tokenizer, **changes, long_documents=choice)
        plan = replace(plan, data=replace(plan.data, row_length=256, max_dropped_share=1.0))
        found = make_sets(plan, tmp_path / choice)
        rows[choice] = decode(found["train"], tokenizer)
        pieces = [name for row in open_records(found["train"]) for name in row["documents"].split()]
        if choice != "continue":  # cut only where longer than a row
            cut = {name for name in pieces if pieces.count(name) > 1}
            assert all(len(tokenizer.encode(rows[choice][name][0])) >= 256 for name in cut)
    assert rows["continue"] == rows["best_fit"]
    dropped = rows["best_fit"].keys() - rows["drop"].keys()
    assert dropped and rows["drop"].keys() <= rows["best_fit"].keys()
    for name, (text,) in rows["best_fit"].items():
        assert (len(tokenizer.encode(text)) + 1 > 256) == (name in dropped)
