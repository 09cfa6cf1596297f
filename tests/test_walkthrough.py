"""The commands of docs/walkthrough.md, as they stand there, with a small network."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rpo_jax.exams.fictional import SIZES, make_world
from rpo_jax.exams.igakuqa import read_questions

torch = pytest.importorskip("torch", reason="wants the `parity` extra")
transformers = pytest.importorskip("transformers", reason="wants the `parity` extra")
pytest.importorskip("libtpu", reason="compiling for TPUs wants libtpu: pip install .[tpu]")

REPO = Path(__file__).resolve().parents[1]
HUB_ID = "Qwen/Qwen2.5-0.5B"  # here a folder
SMALL = (
    "model.shape=",
    "model.attention=dense",
    "data.row_length=64",
    "data.sample.limit=6",
    "data.sample.answers=2",
    "data.sample.explain_tokens=8",
    "data.sample.files=('answers.jsonl',)",  # random weights find no answer
    "data.pair.max_left_out_share=1",
    "data.pair.heldout_share=0.5",
    "train.steps=2",
    "train.batch_rows=2",
    "train.micro_batches=1",
    "optim.warmup_steps=1",
)
# What the page says, in the interpreter of the test, for a small network.
PRELUDE = """
set -euo pipefail
pip() { :; }
git() { :; }
python() {
  case $2 in
    rpo_jax.evaluate) [[ $3 == --report ]] || set -- "$@" --limit 3 --explain_tokens 8 ;;
    rpo_jax.convert) [[ $3 != export ]] || set -- "$@" --base "$HUB_ID" ;;
    *) set -- "$@" "${SMALL[@]/#/--config.}" ;;
  esac
  echo "+ $*"
  "$PYTHON" "$@"
}
"""


def make_checkpoint(folder: Path, tokenizer: Path) -> None:
    """Random weights in the layout of the release."""
    config = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_theta=1e6,
        max_position_embeddings=4096,
        bos_token_id=151643,
        eos_token_id=151643,
        dtype="bfloat16",
    )
    transformers.Qwen2ForCausalLM(config).to(config.dtype).save_pretrained(folder)
    shutil.copy(tokenizer, folder)


def lay_out_release(clone: Path, exam: Path) -> None:
    """The exam as a clone of its release has it: demonstrations outside the folder of the data."""
    (clone / "data").mkdir(parents=True)
    (clone / "scripts/prompts").mkdir(parents=True)
    for path in exam.iterdir():
        (clone / ("data" if path.is_dir() else "scripts/prompts") / path.name).symlink_to(path)


def make_inputs(folder: Path, exam: Path) -> None:
    """What the page asks the user to bring."""
    documents = [document.text for document in make_world(0, SIZES["tiny"]).textbook]
    for name, texts in (("train", documents), ("heldout", documents[:3])):
        (folder / "corpus" / name).mkdir(parents=True)
        lines = [json.dumps({"text": f"{name}: {text}"}) + "\n" for text in texts]
        with gzip.open(folder / "corpus" / name / "0.jsonl.gz", "wt") as file:
            file.writelines(lines)
    explained = "選択肢を順に検討する。"
    ids = [question.id for question in read_questions(exam, [2018, 2019, 2020, 2021])]
    answers = [f"考えた。\n答え: {letter}" for letter in "abcde"]
    for name, texts in (("explanations", [explained]), ("answers", answers)):
        lines = [json.dumps({"id": id_, "text": text}) + "\n" for id_ in ids for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))


@pytest.mark.full
def test_every_command_of_the_walkthrough_runs(tmp_path, igakuqa_dir, qwen_tokenizer):
    page = (REPO / "docs/walkthrough.md").read_text(encoding="utf-8")
    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    make_checkpoint(tmp_path / HUB_ID, qwen_tokenizer)
    make_inputs(tmp_path, igakuqa_dir)
    lay_out_release(tmp_path / "IgakuQA", igakuqa_dir)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    small = "SMALL=(" + " ".join(f'"{override}"' for override in SMALL) + ")\n"
    done = subprocess.run(
        ["bash", "-c", PRELUDE + small + commands],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHON": sys.executable,
            "HUB_ID": HUB_ID,
            "XLA_FLAGS": "",  # one device, as the configs say
            "PYTHONPATH": str(REPO),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for verb in ("convert", "plan", "prepare", "train", "evaluate", "sample", "pair"):
        assert f"+ -m rpo_jax.{verb}" in done.stdout
    after = json.loads((tmp_path / "runs/qwen25-mid-rpo/summary.json").read_text())["heldout"]
    assert "preference_accuracy" in after["after"]
    assert list((tmp_path / "runs/qwen25-mid-cpt/exams").glob("igakuqa-*/comparison.html"))
    card = (tmp_path / "release/README.md").read_text()
    for word in (f"base_model: {HUB_ID}\n", "qwen25-mid-rpo", "| exam | official points"):
        assert word in card
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    assert (again.config.vocab_size, again.dtype) == (151936, torch.bfloat16)
