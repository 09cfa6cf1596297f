"""Pairs of an exam from answers in files: what comes out, what is left out, and what is refused."""

import json
import random

import pytest

from rpo_jax import cli
from rpo_jax.config import defaults, resolve
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.pairs import read_pairs
from rpo_jax.errors import UserError
from rpo_jax.exams.extraction import extract
from rpo_jax.exams.scoring import is_right
from rpo_jax.exams.split import find_leaks, split_exam
from rpo_jax.pair import describe, main, make_pairs
from rpo_jax.prepare import find_sources
from rpo_jax.sample import gather
from rpo_jax.sample import main as sample_main

ANSWERS = 5


def make_config(workdir, **changes):
    """Of pairs of the tiny world's training questions; `sample__shots=3` changes data.sample."""
    config = defaults()
    config.stage, config.name, config.init_from = "rpo", "pairs", "nowhere"
    config.workdir = str(workdir)
    config.train.steps, config.train.batch_rows = 4, 8
    config.data.source, config.data.fictional.size = "candidates", "tiny"
    config.data.fictional.seed = 1  # in which questions are not all alike
    config.data.sample.answers, config.data.sample.shots = 0, 0
    config.data.sample.modes = ("answer_only", "explain_first")
    config.data.sample.files = (f"{workdir}/answers.jsonl",)
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config.data, section) if section else config.data, field, value)
    return resolve(config)


def write_lines(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def make_answers(questions, seed=0):
    """A few answers a question and mode, some right, most wrong; a few without an answer."""
    rng = random.Random(seed)
    for question in questions:
        for place in range(ANSWERS):
            said = question.accepted[0]
            if rng.random() < 0.6:
                count = len(said)
                said = ("99",) if question.is_numeric else rng.sample(question.letters, count)
            said = ",".join(sorted(said)) if rng.random() < 0.95 else "不明"
            thought = "、".join(rng.choices(question.choices or ("一", "二"), k=8 + 2 * place))
            yield {"id": question.id, "mode": "answer_only", "text": f"\n{said}"}
            text = f"{place}: {thought}を考えた。\n答え: {said}"
            yield {"id": question.id, "mode": "explain_first", "text": text}


@pytest.fixture
def workdir(tmp_path):
    questions = split_exam(make_config(tmp_path)).taught
    write_lines(tmp_path / "answers.jsonl", make_answers(questions))
    return tmp_path


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def read_ledgers(folder):
    info = json.loads((folder / "preferences.json").read_text())
    return {unit: Ledger.from_dict(stored) for unit, stored in info["ledgers"].items()}


@pytest.mark.parametrize("strategy", ["right_over_wrong", "truth_over_any", "hierarchy"])
def test_every_pair_is_what_its_strategy_says_and_no_question_is_on_both_sides(workdir, strategy):
    config = make_config(workdir, pair__strategy=strategy, pair__leak_share=0.9)
    split = split_exam(config)
    questions = {question.id: question for question in split.taught}
    folder = make_pairs(config)
    sides = {name: read(folder, name) for name in ("train", "heldout")}
    for records in sides.values():
        for record in records:
            question = questions[record["question"]]
            right = [
                is_right(split.exam, question, extract(question, record[side]).answer)
                for side in ("chosen", "rejected")
            ]
            better, worse = record["relation"].split(" over ")
            assert right == [True, worse == "right"]
            if better == "truth" and record["mode"] == "explain_first":
                assert record["chosen"].startswith(question.explanation)
            cue = {"answer_only": "答え:", "explain_first": "考察:"}[record["mode"]]
            assert record["prompt"].endswith(cue) and question.text in record["prompt"]
    train, heldout = ({r["question"] for r in sides[name]} for name in ("train", "heldout"))
    assert train and heldout and not train & heldout
    leaks = find_leaks(split.taught, split.examined, 0.9)
    assert not leaks.keys() & (train | heldout)
    assert {r["mode"] for r in sides["train"]} == {"answer_only", "explain_first"}
    # What `prepare` reads is these files.
    paths = [folder / "train.jsonl", folder / "heldout.jsonl"]
    for source, path in zip(find_sources(config), paths, strict=True):
        assert list(source.read()) == list(read_pairs([path]))


def test_everything_is_accounted_for(workdir):
    config = make_config(workdir, pair__pairs_per_question=2, pair__leak_share=0.4)
    folder = make_pairs(config)
    ledgers = read_ledgers(folder)
    taught = split_exam(config).taught
    made = sum(len(read(folder, name)) for name in ("train", "heldout"))
    assert ledgers["pairs"].kept == made
    assert ledgers["pairs"].dropped["beyond data.pair.pairs_per_question"].count > 0
    assert ledgers["questions"].kept + ledgers["questions"].dropped_count == 2 * len(taught)
    answers = ledgers["answers"]
    assert answers.kept + answers.dropped_count == 2 * ANSWERS * len(taught)
    assert ledgers["explanations"].kept == len(taught)
    leaks = find_leaks(taught, split_exam(config).examined, config.data.pair.leak_share)
    assert leaks
    reason = "an evaluation question, or 0.4 of one"
    assert ledgers["questions"].dropped[reason].count == 2 * len(leaks)
    told = describe(folder)
    for ledger in ledgers.values():
        assert str(ledger) in told
        for drop in ledger.dropped.values():
            assert drop.example


def test_the_same_input_gives_the_same_bytes_and_each_setting_other_ones(workdir, tmp_path):
    folder = make_pairs(make_config(workdir))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert make_pairs(make_config(workdir)) == folder
    folder.rename(tmp_path / "old")
    assert make_pairs(make_config(workdir)) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    seen = {folder: before["train.jsonl"] + before["heldout.jsonl"]}
    for change in (
        {"pair__strategy": "right_over_wrong"},
        {"pair__pairs_per_question": 1},
        {"pair__max_length_ratio": 1.2},
        {"pair__max_similarity": 0.3},
        {"pair__max_letter_ratio": 0.5},
        {"pair__heldout_share": 0.4},
        {"pair__leak_share": 0.4},
        {"sample__modes": ("explain_first",)},
        {"sample__limit": 20},
        {"sample__shots": 3},
    ):
        other = make_pairs(make_config(workdir, **change))
        assert other not in seen, change
        seen[other] = b"".join((other / f"{x}.jsonl").read_bytes() for x in ("train", "heldout"))
        assert list(seen.values()).count(seen[other]) == 1, change


def test_ground_truth_from_a_file_comes_first(workdir, tmp_path):
    taught = split_exam(make_config(workdir)).taught
    gold, other = (",".join(q.accepted[0]) for q in taught[1:3])
    wrong = next(x for x in taught[2].letters if x not in other)
    lines = [
        {"id": taught[0].id, "text": "本に書いてある。"},
        {"id": "999A9", "text": "ない。"},
        {"id": taught[1].id, "text": f"考察: これも。\n答え: {gold}\n"},
        {"id": taught[2].id, "text": f"これは違う。\n答え: {wrong}"},
    ]
    write_lines(tmp_path / "truth.jsonl", lines)
    truth = {
        "pair__explanations": (f"{tmp_path}/truth.jsonl",),
        "pair__strategy": "truth_over_any",
        "pair__leak_share": 1.0,
        "pair__heldout_share": 0.1,
    }
    folder = make_pairs(make_config(workdir, **truth))
    records = read(folder, "train") + read(folder, "heldout")
    own = {r["chosen"] for r in records if r["question"] == taught[0].id}
    assert f"本に書いてある。\n答え: {','.join(taught[0].accepted[0])}" in own
    # The lines around it are the prompt's and the key's.
    own = {r["chosen"] for r in records if r["question"] == taught[1].id}
    assert f"これも。\n答え: {gold}" in own and not any("考察" in text for text in own)
    assert not any("これは違う" in r["chosen"] for r in records)
    dropped = read_ledgers(folder)["explanations"].dropped
    assert dropped["of a question that is not trained on"].count == 1
    assert dropped["ends in another answer than the key's"].count == 1
    for bad, message in (
        ({"id": taught[0].id, "text": " "}, "is empty"),
        ({"id": taught[0].id, "text": "また。"}, "was explained before"),
    ):
        write_lines(tmp_path / "truth.jsonl", [lines[0], bad])
        with pytest.raises(UserError, match=rf"truth\.jsonl:2: .*{message}"):
            make_pairs(make_config(workdir, **truth))


@pytest.mark.parametrize("name", ["candidates", "preferences"])
def test_what_was_shortened_is_not_used(workdir, name):
    folder = make_pairs(make_config(workdir))
    if name == "candidates":
        (folder,) = (workdir / "data").glob("candidates-*")
    path = folder / ("candidates.jsonl" if name == "candidates" else "train.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=f"{path.name}: not what was written there; delete"):
        make_pairs(make_config(workdir))


def test_too_much_left_out_stops_the_command_and_says_why(workdir, capsys):
    config = make_config(workdir, pair__max_left_out_share=0.05)
    with pytest.raises(UserError) as error:
        make_pairs(config)
    assert "more than data.pair.max_left_out_share=0.05 of the answers is left out" in str(
        error.value
    )
    assert "the same text as another answer" in str(error.value)
    assert not list((workdir / "data").glob("preferences-*"))
    make_pairs(make_config(workdir))  # the judged answers are there already
    assert len(list((workdir / "data").glob("candidates-*"))) == 1


def test_what_cannot_be_is_refused(workdir, tmp_path):
    cases = [
        ({"sample__files": (f"{tmp_path}/none.jsonl",)}, r"data\.sample\.files: no file matches"),
        ({"sample__exam": "bar"}, "no such exam"),
        ({"sample__shots": 2}, "no such prompt"),
        (
            {"sample__limit": 1, "pair__max_left_out_share": 1.0},
            "0 pairs to train on, .* neither may be empty",
        ),
        ({"sample__answers": 2}, "nowhere: no checkpoint there"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            make_pairs(make_config(workdir, **change))
    write_lines(tmp_path / "answers.jsonl", [{"id": "9A9", "text": "", "mode": "answer_only"}])
    with pytest.raises(UserError, match="no answer to a question that is trained on"):
        gather(config := make_config(workdir), split_exam(config))
    for change, message in (
        ({"sample__modes": ("guess",)}, r"data\.sample\.modes=\('guess',\): answer_only or"),
        ({"sample__files": ()}, r"data\.sample\.answers=0 and data\.sample\.files is empty"),
    ):
        with pytest.raises(UserError, match=message):
            make_config(workdir, **change)


def test_the_commands_tell_what_they_made(workdir, capsys):
    path = workdir / "config.py"
    path.write_text(f"""
from rpo_jax.config import defaults
def get_config(arg=""):
    config = defaults()
    config.stage, config.name, config.init_from = "rpo", "pairs", "nowhere"
    config.workdir = {str(workdir)!r}
    config.train.steps, config.train.batch_rows = 4, 8
    config.data.source, config.data.fictional.size = "candidates", "tiny"
    config.data.fictional.seed = 1  # in which questions are not all alike
    config.data.sample.answers, config.data.sample.shots = 0, 0
    config.data.sample.files = ({str(workdir / "answers.jsonl")!r},)
    config.data.sample.modes = ("answer_only", "explain_first")
    return config
""")
    cli.run(sample_main, ["sample", f"--config={path}"], {"share": ""})
    printed = capsys.readouterr().out
    assert "answer_only: " in printed and "questions with a right one" in printed
    cli.run(main, ["pair", f"--config={path}"])
    assert "pairs kept" in capsys.readouterr().out
    for share in ("4/4", "a/b", "1"):
        with pytest.raises(SystemExit):
            cli.run(sample_main, ["sample", f"--config={path}", f"--share={share}"], {"share": ""})
        assert f"--share={share}: like 0/4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run(main, ["pair", f"--config={path}", "--config.data.source=fictional"])
    assert "data.source='fictional': answers are sampled" in capsys.readouterr().err


def test_the_real_exam(tmp_path, igakuqa_dir):
    config = make_config(
        tmp_path,
        sample__exam="igakuqa",
        sample__limit=200,
        igakuqa__directory=str(igakuqa_dir),
        sample__shots=3,
    )
    split = split_exam(config)
    assert len(split.taught) == 200 and sum(q.points for q in split.examined) == 494
    write_lines(tmp_path / "answers.jsonl", make_answers(split.taught))
    folder = make_pairs(config)
    records = read(folder, "train") + read(folder, "heldout")
    assert not any(record["question"].startswith("116") for record in records)
    assert {r["relation"] for r in records if r["mode"] == "explain_first"} == {"right over wrong"}
    questions = read_ledgers(folder)["questions"]
    assert questions.kept + questions.dropped_count == 400
    chosen, rejected = (
        "".join("".join(r[f"{side}_answer"]) for r in records if r["mode"] == "explain_first")
        for side in ("chosen", "rejected")
    )
    for letter in "abcde":
        assert 0 < rejected.count(letter) <= 2 * (chosen.count(letter) + 1)
