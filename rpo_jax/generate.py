"""Completions of one prompt, or of a file of them.

    python -m rpo_jax.generate --checkpoint runs/fictional-rpo --prompt "問題: "
    python -m rpo_jax.generate --checkpoint models/qwen --prompts in.jsonl --out out.jsonl

A line of the prompts is {"id": ..., "prompt": ...}, with "seed" if it is to have its own; a line of
the output has the id and what came. An interrupted command goes on when it is given again.
"""

import argparse
import dataclasses
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rpo_jax.cli import Parser, exit_on_error
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.data.files import digest_files, read_objects, take_string
from rpo_jax.data.tokenizer import Tokenizer
from rpo_jax.errors import UserError
from rpo_jax.generation.batching import make_generate
from rpo_jax.generation.requests import Completion, Request, Settings, check_settings
from rpo_jax.training.opening import Opened, open_model, take_apart
from rpo_jax.writing import hold, write_json


def read_requests(path: Path, tokenizer: Tokenizer, settings: Settings, seed: int) -> list[Request]:
    """The prompts of a JSONL file; a prompt without a seed gets one from `seed` and its id.

    Raises:
        UserError: with file and line, what is missing or mistyped; or the file is empty.
    """
    requests = []
    for where, record in read_objects(path):
        id_ = take_string(where, record, "id")
        own = record.get("seed", _make_seed(seed, id_))
        if not isinstance(own, int) or isinstance(own, bool):
            raise UserError(f"{where}: field 'seed' is {own!r}, an integer is wanted")
        ids = tokenizer.encode(take_string(where, record, "prompt"))
        requests.append(Request(id_, ids, own, settings))
    if not requests:
        raise UserError(f"{path}: holds no prompts")
    return requests


def open_output(out: Path, identity: dict[str, Any]) -> set[str]:
    """The ids that an output file already has; a line that was cut short is taken off.

    Beside it lies `<out>.json`, which says what it was made with.

    Raises:
        UserError: the file was made with something else.
    """
    note = out.with_name(out.name + ".json")
    if out.exists():
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        changed = [name for name in identity if before.get(name) != identity[name]]
        if changed:
            told = "; ".join(f"{n}: {before.get(n)!r} -> {identity[n]!r}" for n in changed)
            raise UserError(f"--out={out}: was made otherwise ({told}); choose another file")
        content = out.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with out.open("r+b") as file:
                file.truncate(len(whole))
        return {record["id"] for _, record in read_objects(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, identity)
    return set()


def complete_file(
    model: Opened, prompts: Path, out: Path, settings: Settings, seed: int, slots: int
) -> str:
    """Completes what was not completed yet, a line as soon as it ends; returns a summary."""
    requests = read_requests(prompts, model.tokenizer, settings, seed)
    identity = {
        "checkpoint": str(model.folder.absolute()),
        "step": model.step,
        "prompts": digest_files([prompts])[0]["sha256"],
        "seed": seed,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
    }
    done = open_output(out, identity)
    asked = [request for request in requests if request.id not in done]
    generate = make_generate(
        model.network, model.mesh, model.tokenizer, end_ids=model.end_ids, slots=slots
    )
    reasons: Counter[str] = Counter()
    tokens, start = 0, time.monotonic()
    bar = tqdm(total=len(requests), initial=len(done), unit=" prompts", disable=None)
    with bar, out.open("a", encoding="utf-8") as file:
        for completion in generate(model.params, asked):
            file.write(_to_line(completion))
            file.flush()
            reasons[completion.stop_reason] += 1
            tokens += len(completion.token_ids)
            bar.update()
            bar.set_postfix({"tokens/s": f"{tokens / (time.monotonic() - start):.0f}"})
    ended = ", ".join(f"{count} by {reason}" for reason, count in sorted(reasons.items()))
    return (
        f"{out}: {len(requests)} completions, {len(done)} of them from before; {tokens} tokens "
        f"now in {time.monotonic() - start:.1f} s" + (f"; ended {ended}" if ended else "")
    )


def _make_seed(seed: int, id_: str) -> int:
    return zlib.crc32(f"{seed} {id_}".encode())


def _to_line(completion: Completion) -> str:
    record = {
        "id": completion.id,
        "text": completion.text,
        "stop_reason": completion.stop_reason,
        "tokens": len(completion.token_ids),
        "logprob": round(completion.logprob, 4),
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m rpo_jax.generate", description=__doc__)
    defaults = Settings()
    add = parser.add_argument
    add("--checkpoint", required=True, help="a model folder: a run, or what `convert import` made")
    add("--step", type=int, help="of its checkpoint; default: the newest")
    add("--prompt", help="one text; its completion is printed")
    add("--prompts", type=Path, help="JSONL file of prompts")
    add("--out", type=Path, help="JSONL file for their completions")
    add(
        "--max_tokens",
        type=int,
        default=defaults.max_tokens,
        help="of a completion (default %(default)s)",
    )
    add(
        "--temperature", type=float, default=defaults.temperature, help="0 (default): the likeliest"
    )
    add("--top_k", type=int, default=defaults.top_k, help="draw among so many; 0 (default): all")
    add(
        "--top_p",
        type=float,
        default=defaults.top_p,
        help="draw among so much probability; %(default)s (default): all",
    )
    add("--stop", action="append", default=[], help="text to stop before; may be given again")
    add("--seed", type=int, default=0, help="with the id, decides what is drawn (default 0)")
    add("--slots", type=int, default=16, help="completions at a time (default 16)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (default %(default)s)",
    )
    add("--tensor", type=int, default=1, help="devices that each matrix is cut over (default 1)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Checks what was asked, opens the model and answers.

    Raises:
        UserError: options that contradict each other, or whatever model and files have wrong.
    """
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("one of --prompt TEXT and --prompts FILE.jsonl is wanted")
    if (args.prompts is None) != (args.out is None):
        raise UserError("--prompts FILE.jsonl and --out FILE.jsonl go together")
    if args.slots < 1:
        raise UserError(f"--slots={args.slots}: at least 1 is wanted")
    settings = Settings(args.max_tokens, args.temperature, args.top_k, args.top_p, tuple(args.stop))
    check_settings(settings, "command line")
    mesh = MeshConfig(data=1, fsdp=-1, tensor=args.tensor)
    model = take_apart(open_model(Path(args.checkpoint), mesh, args.dtype, args.step))
    if args.prompts is not None:
        with hold(args.out):
            print(complete_file(model, args.prompts, args.out, settings, args.seed, args.slots))
        return
    request = Request("", model.tokenizer.encode(args.prompt), _make_seed(args.seed, ""), settings)
    generate = make_generate(
        model.network, model.mesh, model.tokenizer, end_ids=model.end_ids, slots=1
    )
    completions: Iterator[Completion] = generate(model.params, [request])
    (completion,) = completions
    print(completion.text)
    print(
        f"[{len(completion.token_ids)} tokens, {completion.stop_reason}, "
        f"{completion.logprob / len(completion.token_ids):.3f} nats/token]",
        file=sys.stderr,
    )


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and answers."""
    with exit_on_error():
        run(make_parser().parse_args(argv))


if __name__ == "__main__":
    main()
