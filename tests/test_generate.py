"""The command: a prompt or a file of them, gone on with after a kill, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from rpo_jax import convert, generate
from rpo_jax.errors import UserError
from tests.hub import END_OF_TEXT, write_checkpoint

LETTERS = [chr(ord("A") + i) for i in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model of random weights whose tokens are letters."""
    folder = tmp_path_factory.mktemp("model")
    source = write_checkpoint(folder / "hub")
    names = LETTERS.copy()
    names[END_OF_TEXT] = "<|endoftext|>"
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="A"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.save(str(source / "tokenizer.json"))
    convert.main(["import", f"--source={source}", f"--target={folder / 'model'}"])
    return folder / "model"


def run(model: Path, *options: object) -> None:
    generate.run(generate.make_parser().parse_args([f"--checkpoint={model}", *map(str, options)]))


def write_prompts(path: Path, count: int) -> Path:
    records = [
        {"id": f"p{i}", "prompt": "BCD" * 3 + LETTERS[20 + i] * (i + 1)} for i in range(count)
    ]
    records[1]["seed"] = 5
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_is_completed_once_also_after_a_kill(model, tmp_path, capsys):
    prompts, out = write_prompts(tmp_path / "in.jsonl", 7), tmp_path / "out" / "all.jsonl"
    options = ("--prompts", prompts, "--out", out, "--max_tokens=12", "--temperature=0.9")
    run(model, *options, "--slots=4")
    assert "7 completions, 0 of them from before" in capsys.readouterr().out
    lines = out.read_text().splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    assert records.keys() == {f"p{i}" for i in range(7)}
    assert len({record["text"] for record in records.values()}) > 4
    for record in records.values():
        assert record.keys() == {"id", "text", "stop_reason", "tokens", "logprob"}
        written = len(record["text"]) + (record["stop_reason"] == "eos")
        assert written == record["tokens"] <= 12

    out.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # killed while it wrote a line
    run(model, *options, "--slots=2")
    assert "7 completions, 3 of them from before" in capsys.readouterr().out
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["id"] for record in again[:3]] == [json.loads(line)["id"] for line in lines[:3]]
    assert {record["id"]: record["text"] for record in again} == {
        id_: record["text"] for id_, record in records.items()
    }

    with pytest.raises(UserError, match=re.escape("seed: 0 -> 1); choose another file")):
        run(model, *options, "--seed=1")


def test_one_prompt_is_printed(model, capsys):
    run(model, "--prompt=BCDEF", "--max_tokens=6")
    captured = capsys.readouterr()
    first = captured.out
    assert re.search(r"^\[\d tokens, (eos|length), -\d+\.\d+ nats/token\]$", captured.err, re.M)
    run(model, "--prompt=BCDEF", "--max_tokens=6", f"--stop={first[2]}")
    assert capsys.readouterr().out == first[: first.index(first[2])] + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of --prompt TEXT and --prompts FILE.jsonl is wanted"),
        (("--prompt=B", "--prompts=x.jsonl"), "one of --prompt TEXT and"),
        (("--prompts=x.jsonl",), "--prompts FILE.jsonl and --out FILE.jsonl go together"),
        (("--prompt=B", "--slots=0"), "--slots=0: at least 1 is wanted"),
        (("--prompt=B", "--top_p=2"), "command line: top_p=2.0, above 0 and at most 1 is wanted"),
        (("--prompt=B", "--max_tokens=500"), "the model has 128 positions"),
        (("--prompt=",), "its prompt is empty"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(model, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(model, *options)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("\n", "in.jsonl: holds no prompts"),
        ('{"prompt": "B"}\n', "in.jsonl:1: no field 'id'"),
        ('{"id": "a", "prompt": "B"}\n{"id": "b"}\n', "in.jsonl:2: no field 'prompt'"),
        (
            '{"id": "a", "prompt": "B", "seed": "x"}\n',
            "in.jsonl:1: field 'seed' is 'x', an integer",
        ),
        ('{"id": "a", "prompt": "B"}\n' * 2, "request 'a': there is another of that id"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_read_are_refused(model, tmp_path, lines, message):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(lines)
    with pytest.raises(UserError, match=re.escape(message)):
        run(model, "--prompts", prompts, "--out", tmp_path / "out.jsonl", "--max_tokens=5")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="the folder of a run, or one made by"):
        run(tmp_path, "--prompt=B")
