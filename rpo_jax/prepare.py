"""Makes the record sets of a run: `python -m rpo_jax.prepare --config configs/<name>.py`."""

import dataclasses
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.data.beam import make_sets_with_beam
from rpo_jax.data.card import CARD_FILE
from rpo_jax.data.files import digest_files
from rpo_jax.data.ledger import Ledger, check_shares
from rpo_jax.data.local import find_sets, make_sets
from rpo_jax.data.pairs import tokenise_pairs
from rpo_jax.data.records import (
    FORMAT,
    Records,
    digest,
    open_records,
    pair_features,
    write_records,
)
from rpo_jax.data.screening import TRAIN
from rpo_jax.data.showing import show_record
from rpo_jax.data.textplan import Plan, make_plan
from rpo_jax.data.tokenizer import FILE_NAMES, Tokenizer, read_tokenizer, train_sentencepiece
from rpo_jax.errors import UserError
from rpo_jax.exams.sources import (
    PairSource,
    check_apart,
    find_pairs,
    find_questions,
    find_text,
    find_tokenizer_text,
    read_as_they_are,
)


@dataclass(frozen=True)
class Prepared:
    """The folders of the record sets of a run; `general` is text that tells what it forgets."""

    train: Path
    heldout: Path
    general: Path | None = None

    def by_split(self) -> dict[str, Path]:
        """Those that there are."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {split: folder for split, folder in found.items() if folder}


def main(config: Config, beam: str = "", inspect: str = "") -> None:
    """Makes the tokenizer (where the run trains one) and the record sets of a run."""
    tokenizer = load_tokenizer(config)
    if beam:
        if config.stage != "cpt":
            raise UserError(f"--beam: stage={config.stage}: text records alone are made with Beam")
        make_sets_with_beam(
            plan_text(config, tokenizer), Path(config.workdir) / "data", shlex.split(beam)
        )
    prepared = prepare(config, tokenizer).by_split()
    if inspect:
        print(show_records(prepared, inspect, tokenizer, sys.stdout.isatty()))
        return
    print(f"tokenizer: {tokenizer.vocab_size:,} ids, {tokenizer.eos_token} ends a text")
    for split, directory in prepared.items():
        print(f"\n{split}: {directory}\n{describe(open_records(directory))}")


def show_records(
    prepared: Mapping[str, Path], wanted: str, tokenizer: Tokenizer, colour: bool
) -> str:
    """Records as text, with what is trained told apart.

    Args:
        prepared: the record sets, by split.
        wanted: a split, and after a colon numbers of records: `train:0,17`; without, the first.
        tokenizer: of the records.
        colour: for a terminal.

    Raises:
        UserError: no such split or record.
    """
    split, _, numbers = wanted.partition(":")
    if split not in prepared:
        raise UserError(f"--inspect={wanted}: one of {', '.join(prepared)} is wanted")
    records = open_records(prepared[split])
    shown = []
    for number in (numbers or "0").split(","):
        if not number.isdecimal() or int(number) >= len(records):
            raise UserError(
                f"--inspect={wanted}: {number!r} is no record; {split} has 0 to {len(records) - 1}"
            )
        record = records[int(number)]
        shown.append(f"== {split} {number}\n{show_record(record, tokenizer, colour)}")
    return "\n\n".join(shown)


def prepare(config: Config, tokenizer: Tokenizer) -> Prepared:
    """Makes the record sets of a run, where they are not there yet.

    A set lies in `{workdir}/data/` under the fingerprint of all that it depends on: the content of
    the files, the tokenizer, the settings. Runs that agree on those share it.

    Raises:
        UserError: the input is missing or broken, trained on and held out at once, or too much of
            it does not fit.
    """
    if config.stage == "cpt":
        return _prepare_text(config, tokenizer)
    train, heldout = find_sources(config)
    return Prepared(
        _make_pairs(config, tokenizer, "train", train),
        _make_pairs(config, tokenizer, "heldout", heldout),
    )


def find_sources(config: Config) -> tuple[PairSource, PairSource]:
    """The pairs that an rpo stage trains on, and those it holds out; made of answers if it says so.

    Raises:
        UserError: files, folders or answers that are not there.
    """
    if config.data.source != "candidates":
        return find_pairs(config)
    # It imports all that samples; text needs none of it, and each worker imports this module.
    from rpo_jax.pair import make_pairs

    folder = make_pairs(config)
    return read_as_they_are([folder / "train.jsonl"]), read_as_they_are([folder / "heldout.jsonl"])


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that a config names, that of `init_from`, or one trained on the run's text.

    Raises:
        UserError: it is not there, not a tokenizer, or the text is too small to train one.
    """
    if path := config.tokenizer.path:
        if path.startswith("$"):
            raise UserError(
                f"tokenizer.path={path}: the environment variable {path[1:]} is not set; set it, "
                "or --config.tokenizer.path, to a tokenizer.json or a SentencePiece .model"
            )
        if not Path(path).exists():
            raise UserError(f"tokenizer.path={path}: no such tokenizer file or folder")
        return read_tokenizer(path, config.tokenizer.end_of_text)
    if config.origin is None:
        return _train_tokenizer(config)
    folder = config.origin / "model"
    if not any((folder / name).is_file() for name in FILE_NAMES):
        raise UserError(
            f"init_from={config.init_from}: no tokenizer in {folder} ({' or '.join(FILE_NAMES)} is "
            f"wanted); set tokenizer.path, or check init_from{config.origin_hint}"
        )
    return read_tokenizer(folder, config.tokenizer.end_of_text)


def plan_text(config: Config, tokenizer: Tokenizer) -> Plan:
    """What the text records of a run will be made of; reads all files through once.

    Raises:
        UserError: they are not there, or held out and trained on at once.
    """
    plan = make_plan(config.data, tokenizer, find_questions(config), find_text(config))
    by_split: dict[bool, list[Any]] = {True: [], False: []}
    for source, files in zip(plan.sources, plan.files, strict=True):
        by_split[source.split == TRAIN].extend(files)
    check_apart(by_split[True], by_split[False])
    return plan


def describe(records: Records) -> str:
    """What is in a record set, in words."""
    ledger = Ledger.from_dict(records.info["ledger"])
    row_tokens = records.info["row_tokens"]
    tokens = ledger.tokens
    lines = [
        str(ledger),
        f"{len(records):,} rows of {row_tokens:,} tokens, {tokens:,} tokens, "
        f"fill {tokens / (len(records) * row_tokens):.2%}",
    ]
    if "characters" in ledger.totals:
        lines.append(f"{ledger.totals['characters'] / tokens:.2f} characters a token")
        lines.append(f"more in {records.directory / CARD_FILE}")
    else:
        means = (f"{name} {count / ledger.kept:.1f}" for name, count in ledger.totals.items())
        lines.append(f"mean {', '.join(means)}".replace("_tokens", ""))
    return "\n".join(lines)


def _prepare_text(config: Config, tokenizer: Tokenizer) -> Prepared:
    plan = plan_text(config, tokenizer)
    folder = Path(config.workdir) / "data"
    reused = [split for split, path in find_sets(plan, folder).items() if path.exists()]
    found = make_sets(plan, folder)
    for split, directory in found.items():
        records = open_records(directory)
        check_shares(Ledger.from_dict(records.info["ledger"]), split, config.data)
        how = "reused" if split in reused else "made"
        logging.info("%s: %s %s, %d rows", split, directory, how, len(records))
    return Prepared(**found)


def _make_pairs(config: Config, tokenizer: Tokenizer, split: str, source: PairSource) -> Path:
    lengths = {
        "prompt_length": config.data.prompt_length,
        "response_length": config.data.response_length,
    }
    fingerprint = digest(
        {
            "format": FORMAT,
            "rule": source.rule,
            "files": [[Path(file["path"]).name, file["sha256"]] for file in source.files],
            "tokenizer": tokenizer.fingerprint,
            **lengths,
        }
    )
    directory = Path(config.workdir) / "data" / f"pairs-{fingerprint[:16]}"
    if directory.exists():
        records = open_records(directory)
        check_shares(Ledger.from_dict(records.info["ledger"]), split, config.data)
        logging.info("%s: %s reused, %d pairs", split, directory, len(records))
        return directory
    ledger = Ledger("pairs")

    def make_examples() -> Iterator[dict[str, Any]]:
        counted = tqdm(source.read(), desc=f"prepare {split}", unit=" pairs", disable=None)
        yield from tokenise_pairs(iter(counted), tokenizer, **lengths, ledger=ledger)
        check_shares(ledger, split, config.data)
        if not ledger.kept:
            paths = ", ".join(file["path"] for file in source.files)
            raise UserError(f"{split}: there are no pairs in {paths}")

    def make_info() -> dict[str, Any]:
        return {
            "kind": "pairs",
            "fingerprint": fingerprint,
            "row_tokens": config.data.prompt_length + 2 * config.data.response_length,
            "ledger": ledger.to_dict(),
            "provenance": {
                "source": config.data.source,
                "rule": source.rule,
                "files": source.files,
                "tokenizer": tokenizer.fingerprint,
                **lengths,
            },
        }

    records = write_records(directory, pair_features(), make_examples(), make_info)
    logging.info("%s: %s made, %d pairs", split, directory, len(records))
    return directory


def _train_tokenizer(config: Config) -> Tokenizer:
    """A SentencePiece model, made once, of the text trained on (of a world: in any stage)."""
    files, texts = find_tokenizer_text(config)
    size = config.tokenizer.train_vocab_size
    sha256s = [file["sha256"] for file in digest_files(files)]
    fingerprint = digest({"files": sha256s, "vocab_size": size})
    folder = Path(config.workdir) / "data" / f"tokenizer-{fingerprint[:16]}"
    if not (folder / FILE_NAMES[1]).is_file():
        train_sentencepiece(texts, size, folder)
        logging.info("tokenizer: %s trained, %d ids", folder, size)
    return read_tokenizer(folder, config.tokenizer.end_of_text)


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "--config configs/fictional_base.py",
            "--config configs/fictional_base.py --inspect=train:0,17",
        ),
        options={
            "beam": "make text records with Apache Beam (extra `beam`), with these options of its: "
            "'--runner=DirectRunner'",
            "inspect": "show records as text, what is trained told apart: a split, and after a "
            "colon numbers of records (train:0,17)",
        },
    )
