"""Makes the record sets of a run: `python -m rpo_jax.prepare --config configs/<name>.py`."""

import dataclasses
import itertools
import logging
import os
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rpo_jax import cli
from rpo_jax.config import Config
from rpo_jax.data import corpus, pairs
from rpo_jax.data.corpus import Document, read_documents, tokenise_documents
from rpo_jax.data.files import digest_files, find_files
from rpo_jax.data.ledger import Ledger
from rpo_jax.data.packing import pack
from rpo_jax.data.pairs import Pair, read_pairs, tokenise_pairs
from rpo_jax.data.records import (
    FORMAT,
    Features,
    Records,
    digest,
    open_records,
    pair_features,
    text_features,
    write_records,
)
from rpo_jax.data.tokenizer import FILE_NAMES, Tokenizer, read_tokenizer, train_sentencepiece
from rpo_jax.errors import UserError
from rpo_jax.exams import igakuqa
from rpo_jax.exams.igakuqa import Question
from rpo_jax.exams.prompts import ANSWER_ZERO_SHOT_V1, OFFICIAL_COMPLETION_V1
from rpo_jax.exams.split import find_world
from rpo_jax.pair import make_pairs

Read = Callable[[Iterable[Path]], Iterator[Any]]

_HELDOUT_EVERY = 20  # general passages of a world: they have no held-out file of their own


@dataclass(frozen=True)
class Prepared:
    """The folders of the record sets of a run."""

    train: Path
    heldout: Path


@dataclass(frozen=True)
class Source:
    """Documents or pairs, as a stream that can be read again, and all that it depends on.

    Attributes:
        files: whose content it is made of: path, bytes and sha256 of each.
        rule: how; another way of making texts from the same files is another rule.
        read: starts the stream.
    """

    files: Sequence[Mapping[str, Any]]
    rule: str
    read: Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Recipe:
    """How a stage turns documents or pairs into records.

    Attributes:
        kind: of record set.
        unit: of the ledger.
        lengths: the config fields that the records depend on.
        row_tokens: tokens of a row of the model, padding included.
        features: of a record.
        encode: documents or pairs to records.
    """

    kind: str
    unit: str
    lengths: Mapping[str, int]
    row_tokens: int
    features: Features
    encode: Callable[[Iterable[Any], Ledger], Iterator[dict[str, Any]]]


def main(config: Config) -> None:
    """Makes the tokenizer (where the run trains one) and the record sets of a run."""
    tokenizer = load_tokenizer(config)
    prepared = prepare(config, tokenizer)
    print(f"tokenizer: {tokenizer.vocab_size:,} ids, {tokenizer.eos_token} ends a text")
    for split, directory in dataclasses.asdict(prepared).items():
        print(f"\n{split}: {directory}\n{describe(open_records(directory))}")


def prepare(config: Config, tokenizer: Tokenizer) -> Prepared:
    """Makes the record sets of a run, where they are not there yet.

    A set lies in `{workdir}/data/` under the fingerprint of all that it depends on: the content of
    the files, the tokenizer, the lengths. Runs that agree on those share it.

    Raises:
        UserError: the input is missing or broken, trained on and held out at once, or too much of
            it does not fit.
    """
    train, heldout = find_sources(config)
    recipe = _make_recipe(config, tokenizer)
    return Prepared(
        _make_records(config, tokenizer, recipe, "train", train),
        _make_records(config, tokenizer, recipe, "heldout", heldout),
    )


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that a config names, that of `init_from`, or one trained on the run's text.

    Raises:
        UserError: it is not there, not a tokenizer, or the text is too small to train one.
    """
    if config.tokenizer.path:
        return read_tokenizer(config.tokenizer.path, config.tokenizer.end_of_text)
    if config.origin is None:
        return _train_tokenizer(config)
    folder = config.origin / "model"
    if not any((folder / name).is_file() for name in FILE_NAMES):
        raise UserError(
            f"init_from={config.init_from}: no tokenizer in {folder} ({' or '.join(FILE_NAMES)} is "
            f"wanted); set tokenizer.path, or check init_from{config.origin_hint}"
        )
    return read_tokenizer(folder, config.tokenizer.end_of_text)


def find_sources(config: Config) -> tuple[Source, Source]:
    """What a run trains on, and what it holds out.

    Raises:
        UserError: files or folders that are not there, or a held-out file that is trained on.
    """
    match config.data.source:
        case "fictional":
            return _from_world(config)
        case "candidates":
            folder = make_pairs(config)
            return _read_as_is(read_pairs, folder / "train.jsonl", folder / "heldout.jsonl")
        case "igakuqa":
            exam = config.data.igakuqa
            return _from_exam(config, exam.train_years), _from_exam(config, exam.heldout_years)
        case _:
            return _from_files(config)


def describe(records: Records) -> str:
    """What is in a record set, in words."""
    ledger = Ledger.from_dict(records.info["ledger"])
    row_tokens = records.info["row_tokens"]
    tokens = sum(count for name, count in ledger.totals.items() if name.endswith("tokens"))
    lines = [
        str(ledger),
        f"{len(records):,} rows of {row_tokens:,} tokens, {tokens:,} tokens, "
        f"fill {tokens / (len(records) * row_tokens):.2%}",
    ]
    if "characters" in ledger.totals:
        lines.append(f"{ledger.totals['characters'] / tokens:.2f} characters a token")
    else:
        means = (f"{name} {count / ledger.kept:.1f}" for name, count in ledger.totals.items())
        lines.append(f"mean {', '.join(means)}".replace("_tokens", ""))
    return "\n".join(lines)


def _make_recipe(config: Config, tokenizer: Tokenizer) -> Recipe:
    data = config.data
    if config.stage == "cpt":
        return Recipe(
            kind="rows",
            unit="documents",
            lengths={"row_length": data.row_length},
            row_tokens=data.row_length,
            features=text_features(data.row_length),
            encode=lambda documents, ledger: pack(
                tokenise_documents(documents, tokenizer, ledger), data.row_length
            ),
        )
    lengths = {"prompt_length": data.prompt_length, "response_length": data.response_length}
    return Recipe(
        kind="pairs",
        unit="pairs",
        lengths=lengths,
        row_tokens=data.prompt_length + 2 * data.response_length,
        features=pair_features(),
        encode=lambda pairs, ledger: tokenise_pairs(pairs, tokenizer, **lengths, ledger=ledger),
    )


def _make_records(
    config: Config, tokenizer: Tokenizer, recipe: Recipe, split: str, source: Source
) -> Path:
    fingerprint = digest(
        {
            "format": FORMAT,
            "rule": source.rule,
            "files": [[Path(file["path"]).name, file["sha256"]] for file in source.files],
            "tokenizer": tokenizer.fingerprint,
            **recipe.lengths,
        }
    )
    directory = Path(config.workdir) / "data" / f"{recipe.kind}-{fingerprint[:16]}"
    allowed = config.data.max_dropped_share
    if directory.exists():
        records = open_records(directory)
        _check_share(Ledger.from_dict(records.info["ledger"]), split, allowed)
        logging.info("%s: %s reused, %d %s", split, directory, len(records), recipe.kind)
        return directory
    ledger = Ledger(recipe.unit)

    def make_examples() -> Iterator[dict[str, Any]]:
        counted = tqdm(source.read(), desc=f"prepare {split}", unit=f" {recipe.unit}", disable=None)
        yield from recipe.encode(iter(counted), ledger)
        _check_share(ledger, split, allowed)
        if not ledger.kept:
            paths = ", ".join(file["path"] for file in source.files)
            raise UserError(f"{split}: there are no {recipe.unit} in {paths}")

    def make_info() -> dict[str, Any]:
        return {
            "kind": recipe.kind,
            "fingerprint": fingerprint,
            "row_tokens": recipe.row_tokens,
            "ledger": ledger.to_dict(),
            "provenance": {
                "source": config.data.source,
                "rule": source.rule,
                "files": source.files,
                "tokenizer": tokenizer.fingerprint,
                **recipe.lengths,
            },
        }

    records = write_records(directory, recipe.features, make_examples(), make_info)
    logging.info("%s: %s made, %d %s", split, directory, len(records), recipe.kind)
    return directory


def _check_share(ledger: Ledger, split: str, allowed: float) -> None:
    if ledger.dropped_share > allowed:
        raise UserError(
            f"{split}: more than data.max_dropped_share={allowed:g} of the input is left out\n"
            f"{ledger}\n"
            "raise the lengths named here, or data.max_dropped_share to go on without these"
        )


def _train_tokenizer(config: Config) -> Tokenizer:
    """A SentencePiece model, made once, of the text trained on (of a world: in any stage)."""
    if config.data.source == "fictional":
        world = find_world(config)
        documents = (world / "general.jsonl", world / "textbook.jsonl")
        preferences = (world / "pairs_train.jsonl",)
        source = Source(
            digest_files((*documents, *preferences)),
            "all that a world trains on",
            lambda: itertools.chain(read_documents(documents), read_pairs(preferences)),
        )
    else:
        source, _ = find_sources(config)
    size = config.tokenizer.train_vocab_size
    sha256s = [file["sha256"] for file in source.files]
    fingerprint = digest({"rule": source.rule, "files": sha256s, "vocab_size": size})
    folder = Path(config.workdir) / "data" / f"tokenizer-{fingerprint[:16]}"
    if not (folder / FILE_NAMES[1]).is_file():
        texts = itertools.chain.from_iterable(map(_texts, source.read()))
        train_sentencepiece(texts, size, folder)
        logging.info("tokenizer: %s trained, %d ids", folder, size)
    return read_tokenizer(folder, config.tokenizer.end_of_text)


def _texts(item: Document | Pair) -> tuple[str, ...]:
    return (item.text,) if isinstance(item, Document) else (item.prompt, item.chosen, item.rejected)


def _from_files(config: Config) -> tuple[Source, Source]:
    read: Read = read_documents if config.stage == "cpt" else read_pairs
    suffixes = corpus.SUFFIXES if config.stage == "cpt" else pairs.SUFFIXES

    def find(split: str) -> Source:
        files = find_files(getattr(config.data, split), suffixes, f"data.{split}")
        return Source(digest_files(files), "as they are", lambda: read(files))

    train, heldout = find("train"), find("heldout")
    trained = {file["sha256"]: file["path"] for file in train.files}
    for file in heldout.files:
        if file["sha256"] in trained:
            raise UserError(
                f"data.heldout: {file['path']} has the content of {trained[file['sha256']]}, which "
                "data.train holds"
            )
    return train, heldout


def _from_world(config: Config) -> tuple[Source, Source]:
    world = find_world(config)
    if config.stage == "rpo":
        return _read_as_is(read_pairs, world / "pairs_train.jsonl", world / "pairs_heldout.jsonl")
    textbook, textbook_heldout = world / "textbook.jsonl", world / "textbook_heldout.jsonl"
    text = config.data.fictional.text
    parts = []
    if text in ("general", "both"):
        parts.append(_cut_general(world / "general.jsonl"))
    if text in ("textbook", "both"):
        parts.append(_read_as_is(read_documents, textbook, textbook_heldout))
    train, heldout = zip(*parts, strict=True)
    return _join(train), _join(heldout)


def _read_as_is(read: Read, train: Path, heldout: Path) -> tuple[Source, Source]:
    return (
        Source(digest_files([train]), "as they are", lambda: read([train])),
        Source(digest_files([heldout]), "as they are", lambda: read([heldout])),
    )


def _cut_general(path: Path) -> tuple[Source, Source]:
    def pick(held_out: bool) -> Iterator[Document]:
        for place, document in enumerate(read_documents([path])):
            if (place % _HELDOUT_EVERY == 0) == held_out:
                yield document

    rule = f"each {_HELDOUT_EVERY}th held out"
    files = digest_files([path])
    return (
        Source(files, f"{rule}: the others", lambda: pick(False)),
        Source(files, f"{rule}: these", lambda: pick(True)),
    )


def _join(sources: Sequence[Source]) -> Source:
    return Source(
        [file for source in sources for file in source.files],
        "; ".join(source.rule for source in sources),
        lambda: itertools.chain.from_iterable(source.read() for source in sources),
    )


def _from_exam(config: Config, years: Sequence[int]) -> Source:
    named = config.data.igakuqa.directory or os.environ.get("IGAKUQA_DIR", "")
    if not named:
        raise UserError(
            "data.source=igakuqa needs a copy of the exam: set data.igakuqa.directory, or "
            "IGAKUQA_DIR, to the folder that holds 2018 to 2022"
        )
    folder = Path(named).expanduser()
    questions = igakuqa.read_questions(folder, years)
    folders = [folder / str(year) for year in sorted(set(years))]
    files = [path for year in folders for path in sorted(year.glob("*.jsonl"))]
    if config.stage == "cpt":
        return Source(
            digest_files(files),
            f"{ANSWER_ZERO_SHOT_V1.name} with its answer",
            lambda: map(_tell, questions),
        )
    demonstrations = igakuqa.read_demonstrations(folder)
    return Source(
        digest_files([*files, folder / igakuqa.DEMONSTRATIONS_FILE]),
        f"{OFFICIAL_COMPLETION_V1.name}, right over wrong",
        lambda: (_prefer(question, demonstrations) for question in questions),
    )


def _tell(question: Question) -> Document:
    """A question with its answer, as a text to read."""
    answer = ANSWER_ZERO_SHOT_V1.target(question, question.accepted[0])
    return Document(question.id, ANSWER_ZERO_SHOT_V1.render(question) + answer)


def _prefer(question: Question, demonstrations: Sequence[Question]) -> Pair:
    """The right answer over a wrong one of the same length, drawn by the question's id."""
    style = OFFICIAL_COMPLETION_V1
    right = question.accepted[0]
    rng = random.Random(f"a wrong answer to {question.id}")
    wrong = right
    if question.is_numeric:
        while wrong == right:
            wrong = (re.sub(r"\d", lambda digit: rng.choice(string.digits), right[0]),)
    else:
        sets = itertools.combinations(question.letters, len(right))
        wrong = rng.choice([letters for letters in sets if letters not in question.accepted])
    return Pair(
        id=question.id,
        prompt=style.render(question, demonstrations),
        chosen=style.target(question, right),
        rejected=style.target(question, wrong),
    )


if __name__ == "__main__":
    cli.run(main)
