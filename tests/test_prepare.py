"""The prepare command: records that say what the input says, made once, refused when it is bad."""

import json
import logging
import re

import numpy as np
import pytest

from rpo_jax import cli
from rpo_jax.config import defaults, resolve
from rpo_jax.data.records import open_records
from rpo_jax.errors import UserError
from rpo_jax.exams.igakuqa import read_demonstrations, read_questions
from rpo_jax.exams.prompts import OFFICIAL_COMPLETION_V1
from rpo_jax.exams.sources import find_text
from rpo_jax.prepare import load_tokenizer, main, prepare, show_records

# ml_collections loads config files by a method that Python 3.11 calls deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")

CONFIG = """
from rpo_jax.config import defaults

def get_config(arg=""):
    config = defaults()
    config.update({values!r})
    return config
"""


def make_values(workdir, **changes):
    """The values of a small run on the smallest fictional world; dots in names become `__`."""
    values = {
        "stage": "cpt",
        "name": "test",
        "workdir": str(workdir),
        "model__shape": "qwen2.5-0.5b",
        "train__steps": 1,
        "train__batch_rows": 1,
        "data__source": "fictional",
        "data__fictional__size": "tiny",
        "data__row_length": 64,
        "tokenizer__train_vocab_size": 800,
    } | changes
    nested = {}
    for name, value in values.items():
        *path, last = name.split("__")
        section = nested
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return nested


def make_config(workdir, **changes):
    values = defaults()
    values.update(make_values(workdir, **changes))
    return resolve(values.to_dict())


def run_command(tmp_path, capsys, **changes):
    """Exit status, output and error output of the command."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(values=make_values(tmp_path / "runs", **changes)))
    try:
        cli.run(main, ["prepare", f"--config={path}"])
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A work folder with a world, its tokenizer and its CPT records."""
    workdir = tmp_path_factory.mktemp("runs")
    config = make_config(workdir)
    return workdir, config, prepare(config, load_tokenizer(config))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def decode_documents(directory, tokenizer):
    """The documents of a record set, sorted: in the rows they stand by their hash."""
    tokens = np.concatenate(
        [row["tokens"][row["segment_ids"] > 0] for row in open_records(directory)]
    )
    ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
    assert ends[-1] == len(tokens)
    return sorted(tokenizer.decode(ids[:-1].tolist()) for ids in np.split(tokens, ends[:-1]))


def texts(workdir, name):
    (folder,) = (workdir / "data").glob("world-*")
    return [record["text"] for record in read_lines(folder / name)]


def kept(workdir, name):
    return sorted(texts(workdir, name))


def test_rows_hold_the_text_of_the_world(world):
    workdir, config, prepared = world
    tokenizer = load_tokenizer(config)
    assert decode_documents(prepared.train, tokenizer) == kept(workdir, "textbook.jsonl")
    assert decode_documents(prepared.heldout, tokenizer) == kept(workdir, "textbook_heldout.jsonl")
    info = open_records(prepared.train).info
    assert info["ledger"]["kept"] == len(texts(workdir, "textbook.jsonl"))
    provenance = info["provenance"]
    assert provenance["row_length"] == 64 and provenance["tokenizer"] == tokenizer.fingerprint
    assert provenance["files"][0]["path"].endswith("textbook.jsonl")
    assert len(provenance["files"][0]["sha256"]) == 64


def test_general_passages_are_cut_into_two_parts(world):
    workdir, _, _ = world
    found = {}
    for text in ("general", "both"):
        # A dose for the same weight is asked in nearly the same words in general text and exam.
        whole = {"data__corpus__decontaminate": False}
        config = make_config(workdir, data__fictional__text=text, **whole)
        prepared = prepare(config, tokenizer := load_tokenizer(config))
        found[text] = [
            decode_documents(folder, tokenizer) for folder in (prepared.train, prepared.heldout)
        ]
    train, heldout = found["general"]
    everything = texts(workdir, "general.jsonl")
    assert heldout == sorted(everything[::20])
    assert train == sorted(text for place, text in enumerate(everything) if place % 20)
    textbook, textbook_heldout = (
        texts(workdir, name) for name in ("textbook.jsonl", "textbook_heldout.jsonl")
    )
    assert found["both"] == [sorted(train + textbook), sorted(heldout + textbook_heldout)]


def test_one_tokenizer_serves_all_stages_of_a_world(world):
    workdir, config, _ = world
    general = make_config(workdir, data__fictional__text="general")
    assert load_tokenizer(general).fingerprint == load_tokenizer(config).fingerprint
    assert len(list((workdir / "data").glob("tokenizer-*"))) == 1
    other = make_config(workdir, tokenizer__train_vocab_size=801)
    assert load_tokenizer(other).vocab_size == 801


def test_pairs_hold_the_preferences_of_the_world(world):
    workdir, config, _ = world
    tokenizer = load_tokenizer(config)
    tokenizer.save(workdir / "base" / "model")
    rpo = make_config(
        workdir,
        stage="rpo",
        init_from=str(workdir / "base"),
        model__shape="",
        data__prompt_length=300,
        data__response_length=300,
    )
    assert load_tokenizer(rpo).fingerprint == tokenizer.fingerprint
    prepared = prepare(rpo, tokenizer)
    (folder,) = (workdir / "data").glob("world-*")
    for split, directory in (("train", prepared.train), ("heldout", prepared.heldout)):
        found = [
            {"id": record["id"]}
            | {
                name: tokenizer.decode(record[f"{name}_ids"].tolist()).removesuffix("<|endoftext|>")
                for name in ("prompt", "chosen", "rejected")
            }
            for record in open_records(directory)
        ]
        assert found == read_lines(folder / f"pairs_{split}.jsonl")
        for record in open_records(directory):
            assert record["chosen_ids"][-1] == record["rejected_ids"][-1] == tokenizer.eos_id
    shown = show_records(prepared.by_split(), "heldout:0", tokenizer, colour=True)
    for style, name in (("2", "prompt"), ("32", "chosen"), ("31", "rejected")):
        assert f"\033[{style}m{found[0][name]}\033[0m" in shown


def test_records_are_reused_exactly_when_nothing_changed(world, caplog):
    workdir, config, prepared = world
    before = {path: path.stat().st_mtime_ns for path in prepared.train.iterdir()}
    with caplog.at_level(logging.INFO):
        assert prepare(config, load_tokenizer(config)) == prepared
    assert caplog.text.count("reused") == 2
    assert {path: path.stat().st_mtime_ns for path in prepared.train.iterdir()} == before
    longer = make_config(workdir, data__row_length=65)
    other = make_config(workdir, tokenizer__train_vocab_size=801)
    seeded = make_config(workdir, data__fictional__seed=1)
    renamed = make_config(workdir, name="again", seed=5, train__steps=9)
    found = {prepare(changed, load_tokenizer(changed)).train for changed in (longer, other, seeded)}
    assert len(found | {prepared.train}) == 4
    assert prepare(renamed, load_tokenizer(renamed)) == prepared


def test_the_command_tells_what_it_made(tmp_path, capsys):
    status, output, _ = run_command(tmp_path, capsys)
    assert status == 0
    assert "tokenizer: 800 ids, <|endoftext|> ends a text" in output
    assert "documents kept, 0 dropped (0.00%)" in output
    assert "rows of 64 tokens" in output and "fill 9" in output and "characters a token" in output
    for split in ("train: ", "heldout: "):
        (line,) = (line for line in output.splitlines() if line.startswith(split))
        assert (tmp_path / "runs" / "data") in open_records(
            tmp_path / line.removeprefix(split)
        ).directory.parents


QUESTIONS = 400


@pytest.fixture(scope="module")
def exam_values(igakuqa_dir, qwen_tokenizer):
    return {
        "data__source": "igakuqa",
        "data__igakuqa__directory": str(igakuqa_dir),
        "data__igakuqa__train_years": (2021,),
        "data__igakuqa__heldout_years": (2022,),
        "tokenizer__path": str(qwen_tokenizer),
    }


# Asked before, and what they are like in 2022: the first word for word.
REPEATED = {"113E2": "116B10", "113D21": "116A4", "114F50": "116A24"}


def test_the_exam_as_text(tmp_path, exam_values, igakuqa_dir):
    years = {"data__igakuqa__train_years": (2018, 2019, 2020, 2021)}
    config = make_config(tmp_path, **exam_values | years, data__row_length=512)
    tokenizer = load_tokenizer(config)
    prepared = prepare(config, tokenizer)
    questions = read_questions(igakuqa_dir)
    for held_out, directory in ((False, prepared.train), (True, prepared.heldout)):
        documents = decode_documents(directory, tokenizer)
        asked = [q for q in questions if (q.year == 2022) == held_out and q.id not in REPEATED]
        assert len(documents) == len(asked) == (QUESTIONS if held_out else 4 * QUESTIONS - 3)
        held = "\0".join(documents)
        for question in asked:
            assert question.text in held
        answers = sorted(",".join(question.accepted[0]) for question in asked)
        assert sorted(document.rpartition("\n")[2] for document in documents) == answers
    assert sum(question.points for question in questions if question.year == 2022) == 494
    info = open_records(prepared.train).info
    assert info["ledger"]["dropped"]["holds a question of the evaluation"]["count"] == 3
    found = {name for name, c in info["questions"]["contacts"].items() if c["documents"]}
    assert found == set(REPEATED.values()) and not info["questions"]["too_short"]


def test_the_exam_as_pairs(tmp_path, exam_values, igakuqa_dir):
    config = make_config(
        tmp_path,
        **exam_values,
        stage="rpo",
        init_from=str(tmp_path),
        data__prompt_length=1536,
        data__response_length=16,
    )
    tokenizer = load_tokenizer(config)
    demonstrations = read_demonstrations(igakuqa_dir)
    records = open_records(prepare(config, tokenizer).heldout)
    assert len(records) == QUESTIONS
    for record, question in zip(records, read_questions(igakuqa_dir, [2022]), strict=True):
        prompt, chosen, rejected = (
            tokenizer.decode(record[f"{name}_ids"].tolist())
            for name in ("prompt", "chosen", "rejected")
        )
        assert record["id"] == question.id
        assert prompt == OFFICIAL_COMPLETION_V1.render(question, demonstrations)
        right, wrong = (
            tuple(text.removeprefix("\n").removesuffix("<|endoftext|>").split(","))
            for text in (chosen, rejected)
        )
        assert right in question.accepted
        assert wrong not in question.accepted and len(wrong) == len(right)
        if not question.is_numeric:
            assert list(wrong) == sorted(set(wrong)) and set(wrong) <= set(question.letters)


def test_the_exam_is_found_by_environment(tmp_path, exam_values, igakuqa_dir, monkeypatch):
    config = make_config(tmp_path, **exam_values | {"data__igakuqa__directory": ""})
    monkeypatch.delenv("IGAKUQA_DIR", raising=False)
    with pytest.raises(UserError, match=r"set data\.igakuqa\.directory, or IGAKUQA_DIR"):
        find_text(config)
    monkeypatch.setenv("IGAKUQA_DIR", str(igakuqa_dir))
    for files in find_text(config).values():
        assert [len(path.read_text().splitlines()) for path in files] == [QUESTIONS]


TEXT = "".join(f'{{"text": "number {n} of {n * n}"}}\n' for n in range(300))


def pair_line(number, prompt="Which one?"):
    pair = {"id": str(number), "prompt": prompt, "chosen": f"{number}", "rejected": "none"}
    return json.dumps(pair) + "\n"


@pytest.fixture
def file_values(tmp_path):
    """A run on files: a train file and a held-out file, both fine."""
    for name, content in (("train.jsonl", TEXT), ("heldout.jsonl", '{"text": "held out"}\n')):
        (tmp_path / name).write_text(content)
    return {
        "data__source": "files",
        "data__train": (str(tmp_path / "tr*.jsonl"),),
        "data__heldout": (str(tmp_path / "heldout.jsonl"),),
        "tokenizer__train_vocab_size": 300,
    }


@pytest.fixture
def pair_values(tmp_path, file_values, world):
    """The same with pairs, starting from a run that has a tokenizer."""
    for name, first in (("train", 0), ("heldout", 50)):
        lines = "".join(pair_line(number) for number in range(first, first + 50))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    load_tokenizer(world[1]).save(tmp_path / "base" / "model")
    return file_values | {"stage": "rpo", "init_from": str(tmp_path / "base"), "model__shape": ""}


def test_files_become_records(tmp_path, capsys, file_values):
    status, output, _ = run_command(tmp_path, capsys, **file_values)
    assert status == 0 and "300 documents kept" in output and "1 documents kept" in output


def assert_refused(outcome, tmp_path, *wanted):
    """One clear message, no traceback, status 2, and no record set left behind."""
    status, _, errors = outcome
    assert status == 2, errors
    assert "Traceback" not in errors and errors.splitlines()[-1] and "error: " in errors
    for text in wanted:
        assert text in errors
    left = [path.name for path in (tmp_path / "runs").glob("data/*")]
    assert not [name for name in left if "incomplete" in name]
    return left


def test_files_become_pairs(tmp_path, capsys, pair_values):
    status, output, _ = run_command(tmp_path, capsys, **pair_values)
    assert status == 0 and "50 pairs kept" in output and "mean prompt" in output


def test_a_line_that_is_not_json(tmp_path, capsys, file_values):
    (tmp_path / "train.jsonl").write_text(TEXT + '{"text": \n')
    outcome = run_command(tmp_path, capsys, **file_values)
    left = assert_refused(outcome, tmp_path, "train.jsonl:301: not a JSON object")
    assert not [name for name in left if re.fullmatch("rows-[0-9a-f]+", name)]


def test_a_missing_file(tmp_path, capsys, file_values):
    (tmp_path / "heldout.jsonl").unlink()
    outcome = run_command(tmp_path, capsys, **file_values)
    assert_refused(outcome, tmp_path, "data.heldout: no file matches", "heldout.jsonl")


def test_an_empty_response(tmp_path, capsys, pair_values):
    bad = json.dumps({"id": "x", "prompt": "a", "chosen": "", "rejected": "b"})
    (tmp_path / "heldout.jsonl").write_text(pair_line(1) + bad)
    outcome = run_command(tmp_path, capsys, **pair_values)
    assert_refused(outcome, tmp_path, "heldout.jsonl:2: 'chosen' is empty")


def test_a_held_out_copy_of_the_training_text(tmp_path, capsys, file_values):
    (tmp_path / "heldout.jsonl").write_text(TEXT)
    outcome = run_command(tmp_path, capsys, **file_values)
    assert_refused(outcome, tmp_path, "data.heldout", "heldout.jsonl", "train.jsonl")


def test_nothing_to_learn_from(tmp_path, capsys, file_values):
    (tmp_path / "heldout.jsonl").write_text("\n")
    outcome = run_command(tmp_path, capsys, **file_values)
    assert_refused(outcome, tmp_path, "heldout: there are no documents in", "heldout.jsonl")


def test_empty_documents_are_counted_up_to_the_threshold(tmp_path, capsys, file_values):
    (tmp_path / "train.jsonl").write_text(TEXT + '{"text": " "}\n' * 3)
    status, output, _ = run_command(tmp_path, capsys, **file_values)
    assert status == 0
    assert "300 documents kept, 3 dropped (0.99%)\n  3 empty; the first: " in output
    assert "train.jsonl:301" in output
    copy = TEXT[: TEXT.index("\n") + 1]
    (tmp_path / "train.jsonl").write_text(TEXT + '{"text": " "}\n' * 4 + copy)
    outcome = run_command(tmp_path, capsys, **file_values)
    told = (
        "train: 1.31% of the documents left out, more than data.max_dropped_share=0.01\n  4 empty"
    )
    assert_refused(outcome, tmp_path, told, "\nraise data.max_dropped_share to go on without these")
    assert "the same text" not in outcome[2] and "lengths" not in outcome[2]


def test_prompts_that_do_not_fit_are_counted_up_to_the_threshold(tmp_path, capsys, pair_values):
    long = pair_line(1000, prompt="x" * 70) + pair_line(1001, prompt="x" * 90)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() + long)
    short = pair_values | {"data__prompt_length": 64}
    told = (
        "train: 3.85% of the pairs left out, more than data.max_dropped_share=0.01",
        "2 prompt longer than data.prompt_length=64 tokens, the largest 9",
        "the first: 1000",
        "raise the lengths named here, or raise data.max_dropped_share to go on",
    )
    assert_refused(run_command(tmp_path, capsys, **short), tmp_path, *told)
    allowed = short | {"data__max_dropped_share": 0.05}
    status, output, _ = run_command(tmp_path, capsys, **allowed)
    assert status == 0 and told[1] in output
    assert "50 pairs kept, 2 dropped (3.85%)" in output
    # The set is there now; the stricter run must not take it without a word.
    assert_refused(run_command(tmp_path, capsys, **short), tmp_path, *told)


def test_records_are_shown_as_text(tmp_path, capsys, file_values):
    values = file_values | {"data__general": (str(tmp_path / "heldout.jsonl"),)}
    assert run_command(tmp_path, capsys, **values)[0] == 0
    config = make_config(tmp_path / "runs", **values)
    tokenizer = load_tokenizer(config)
    prepared = prepare(config, tokenizer).by_split()
    assert list(prepared) == ["train", "heldout", "general"]
    shown = show_records(prepared, "heldout", tokenizer, colour=False)
    assert "== heldout 0\nheldout.jsonl#1, " in shown and "tokens of padding" in shown
    first = tokenizer.decode(tokenizer.encode("held out")[:1])
    assert f"⟦{first}⟧" in shown
    assert "\033[32m" in show_records(prepared, "general:0", tokenizer, colour=True)
    for wanted, message in (("dev", "one of train, heldout, general"), ("train:999", "no record")):
        with pytest.raises(UserError, match=message):
            show_records(prepared, wanted, tokenizer, colour=False)


def test_damaged_records_are_not_used(tmp_path, capsys, file_values):
    run_command(tmp_path, capsys, **file_values)
    shard = next((tmp_path / "runs" / "data").glob("rows-*/*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    outcome = run_command(tmp_path, capsys, **file_values)
    assert_refused(outcome, tmp_path, str(shard), "delete")


def test_a_run_to_start_from_without_a_tokenizer(tmp_path, capsys, pair_values):
    outcome = run_command(tmp_path, capsys, **pair_values | {"init_from": str(tmp_path / "no")})
    assert_refused(outcome, tmp_path, f"init_from={tmp_path / 'no'}: no tokenizer in")


def test_a_tokenizer_path_that_is_wrong(tmp_path, capsys, file_values):
    outcome = run_command(tmp_path, capsys, **file_values, tokenizer__path=str(tmp_path / "t.json"))
    assert_refused(outcome, tmp_path, "t.json: no such tokenizer file")


def test_a_world_too_small_for_its_vocabulary(tmp_path, capsys):
    outcome = run_command(tmp_path, capsys, tokenizer__train_vocab_size=50_000)
    assert_refused(outcome, tmp_path, "tokenizer.train_vocab_size to at most")
