"""How fast text becomes records, and in how much memory, against a plain loop over the tokenizer.

    python tests/benchmarks/prepare_bench.py --folder /scratch --megabytes 100 1000 --out bench.json

The text is made of the phrases of IgakuQA's questions of 2018 to 2021, cut at punctuation and drawn
anew, in documents of about 1.2 thousand characters: it reads like nothing, and costs what Japanese
costs. Wants IGAKUQA_DIR and QWEN_TOKENIZER. The plain loop reads the same file line by line and has
the `tokenizers` library encode a thousand texts at a time on all cores, which is all that it does.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import tokenizers

from rpo_jax.data.records import open_records
from rpo_jax.exams.igakuqa import read_questions

REPO = Path(__file__).resolve().parents[2]
CONFIG = """
from rpo_jax.config import defaults

def get_config(arg=""):
    config = defaults()
    config.stage, config.name, config.model.shape = "cpt", "bench", "laptop-qwen-vocab"
    config.train.steps = config.train.batch_rows = 1
    config.data.row_length = 4096
    config.data.corpus.heldout_share = 0.01
    config.data.corpus.exams = ("igakuqa:2022",)
    config.data.corpus.min_characters = 20
    config.data.corpus.min_kana_share = 0.05
    config.data.corpus.max_repetition = 0.5
    config.data.corpus.boilerplate_lines = ("^Copyright", "Cookie")
    return config
"""


def write_text(path: Path, megabytes: int, exam: Path) -> None:
    """A JSONL file of that size, the same each time."""
    rng = random.Random(megabytes)
    questions = read_questions(exam, [2018, 2019, 2020, 2021])
    text = "\n".join("\n".join([q.text, *q.choices]) for q in questions)
    phrases = [phrase for phrase in re.split(r"(?<=[、。\n])", text) if len(phrase) > 3]
    size, number = 0, 0
    with path.open("wb") as file:
        while size < megabytes * 10**6:
            document = "".join(rng.choices(phrases, k=int(rng.lognormvariate(4, 0.8)) + 1))
            record = {"id": f"d{number}", "text": document}
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            size, number = size + len(line), number + 1


def run_plain(path: Path, tokenizer: Path) -> dict[str, float]:
    """Seconds and tokens of the plain loop."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    library.encode_special_tokens = True
    started, cpu, tokens, texts = time.perf_counter(), time.process_time(), 0, []

    def flush() -> int:
        found = sum(len(e.ids) for e in library.encode_batch(texts, add_special_tokens=False))
        texts.clear()
        return found

    with path.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            if len(texts) == 1000:
                tokens += flush()
    tokens += flush()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens}


def make_command(
    path: Path, folder: Path, tokenizer: Path, *changes: str
) -> tuple[list[str], Path]:
    """`prepare` of a file, and the work folder, which is empty."""
    workdir = folder / "runs"
    shutil.rmtree(workdir, ignore_errors=True)
    config = folder / "config.py"
    config.write_text(CONFIG)
    command = [
        *(sys.executable, "-m", "rpo_jax.prepare", f"--config={config}"),
        f"--config.workdir={workdir}",
        f"--config.tokenizer.path={tokenizer}",
        f"--config.data.train=('{path}',)",
        "--config.data.workers=2",
        *changes,
    ]
    return command, workdir


def run_prepare(path: Path, folder: Path, tokenizer: Path, *changes: str) -> dict[str, float]:
    """Seconds, the largest process in MiB, and fill of `prepare`."""
    command, workdir = make_command(path, folder, tokenizer, *changes)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # what it used, with the processes that it started
    seconds = time.perf_counter() - started
    assert status == 0, command
    (train,) = (
        records
        for records in map(open_records, (workdir / "data").glob("rows-*"))
        if records.info["provenance"]["split"] == "train"
    )
    tokens = train.info["ledger"]["totals"]["tokens"]
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "largest_process_mib": usage.ru_maxrss / 1024,
        "documents": train.info["ledger"]["kept"],
        "dropped": {k: v["count"] for k, v in train.info["ledger"]["dropped"].items()},
        "tokens": tokens,
        "fill": tokens / (len(train) * 4096),
        "shards": len(train.info["shards"]),
    }


CHOOSE = """
import resource, runpy, sys
sys.argv = ["prepare", *sys.argv[1:]]
runpy.run_module("rpo_jax.prepare", run_name="__main__")
print("peak KiB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure_index(folder: Path, tokenizer: Path, documents: int, *changes: str) -> dict[str, float]:
    """Seconds, and the peak in MiB of the process that chooses, for so many short documents."""
    rng, path = random.Random(documents), folder / f"documents-{documents}.jsonl"
    with path.open("w") as file:
        for number in range(documents):
            text = "".join(chr(rng.randrange(0x3042, 0x3082)) for _ in range(30))
            file.write(json.dumps({"id": f"d{number}", "text": text}, ensure_ascii=False) + "\n")
    command, _ = make_command(path, folder, tokenizer, *changes)
    command[1:3] = ["-c", CHOOSE]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    peak = int(done.stdout.rpartition("peak KiB:")[2]) / 1024
    return {"documents": documents, "seconds": seconds, "choosing_process_mib": peak}


WAYS = {
    "no de-duplication": ["--config.data.corpus.drop_copies=false"],
    "copies": [],
    "near copies": ["--config.data.corpus.near_copies=0.8"],
}


def main() -> None:
    """Makes the text, times what is asked for, writes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--ways", nargs="+", default=["plain loop", *WAYS])
    parser.add_argument(
        "--documents", type=int, nargs="*", default=[], help="memory by their number"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Path(os.environ["QWEN_TOKENIZER"])
    results, fresh = [], multiprocessing.get_context("spawn")
    for megabytes in args.megabytes:
        path = args.folder / f"text-{megabytes}.jsonl"
        if not path.exists():
            write_text(path, megabytes, Path(os.environ["IGAKUQA_DIR"]))
        for way in args.ways:
            if way == "plain loop":
                # In a process of its own: those started from a large one are told its peak.
                with concurrent.futures.ProcessPoolExecutor(1, fresh) as pool:
                    found = pool.submit(run_plain, path, tokenizer).result()
            else:
                found = run_prepare(path, args.folder, tokenizer, *WAYS[way])
            size = path.stat().st_size / 1e6
            results.append(
                {"way": way, "megabytes": size, **found, "mb_per_s": size / found["seconds"]}
            )
            print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    for documents in args.documents:
        for way in args.ways:
            found = measure_index(args.folder, tokenizer, documents, *WAYS[way])
            results.append({"way": way, **found})
            print(json.dumps(results[-1]), flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True
    )
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    figures = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {cpu[1] if cpu else platform.processor()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tokenizers", "numpy", "array-record")},
        },
        "seeds": "the size of the text in MB",
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
