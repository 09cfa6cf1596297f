"""Text records made on one machine, by several processes, in memory that does not grow with them.

Texts wait on the disk between the steps; of each document only its hash and where it lies is held
in memory. Each finished piece is a file: what was killed goes on from there, and bad input costs
the parts that hold it.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rpo_jax.data.card import CARD_FILE, render_card
from rpo_jax.data.copies import Texts, choose_shard, find_copies, find_groups, find_near_copies
from rpo_jax.data.filling import Chosen, Shard, fill_shard
from rpo_jax.data.naming import check_names
from rpo_jax.data.records import FULL_DISK, digest, seal_records, shard_name, text_features
from rpo_jax.data.screening import Account
from rpo_jax.data.spill import Spill, read_json
from rpo_jax.data.textplan import (
    Plan,
    choose_passes,
    describe_set,
    leave_out,
    spread_passes,
)
from rpo_jax.errors import UserError
from rpo_jax.writing import place_folder, write_array, write_json

_CHOSEN = np.dtype([("part", "<u4"), ("row", "<u4")])
_WORKER_BYTES = 8 * 2**20  # of input, that are worth the start of a process


@dataclass(frozen=True)
class Work:
    """The folder of a plan that is being carried out."""

    plan: Plan
    folder: Path

    @property
    def spill(self) -> Spill:
        """The screened parts, which plans with the same settings share."""
        return Spill(self.plan, self.folder)

    def shards(self, split: str) -> Path:
        """Where the record files of a split are written."""
        return self.folder / f"{self.plan.fingerprint[:16]}-{split}"

    def note(self, name: str) -> Path:
        """A file about this plan."""
        return self.folder / f"{self.plan.fingerprint[:16]}-{name}"


def find_sets(plan: Plan, folder: Path) -> dict[str, Path]:
    """The folder of the record set of each split, whether it is there or not."""
    prints = {split: digest({"plan": plan.fingerprint, "split": split}) for split in plan.splits}
    return {split: folder / f"rows-{found[:16]}" for split, found in prints.items()}


def open_work(plan: Plan, folder: Path) -> Work:
    """The folder for all that is unfinished."""
    return Work(plan, folder / f"rows-{digest(plan.settings)[:16]}.unfinished")


def make_sets(plan: Plan, folder: Path) -> dict[str, Path]:
    """The record sets of a plan by split, made where they are not there yet.

    Raises:
        UserError: bad input, too much left out, or no room on the disk. What is finished stays, and
            the same call goes on from there.
    """
    found = find_sets(plan, folder)
    work = open_work(plan, folder)
    if not all(directory.exists() for directory in found.values()):
        with hold(work.folder), _naming_full_disk(work.folder):
            if not all(directory.exists() for directory in found.values()):
                _make(work)
                seal_sets(work, found)
            shutil.rmtree(work.folder)
    return found


def _make(work: Work) -> None:
    plan = work.plan
    shards = [(split, i) for split in plan.splits for i in range(plan.count_shards(split))]
    for split in plan.splits:
        work.shards(split).mkdir(exist_ok=True)
    with _start_workers(work, max(len(plan.parts), len(shards))) as run:
        run("read", _screen, [(number,) for number in range(len(plan.parts))])
        _choose(work)
        run("write", _fill, shards)


def seal_sets(work: Work, found: Mapping[str, Path]) -> None:
    """Makes record sets of finished shards, all or none.

    Raises:
        UserError: too much was left out.
    """
    plan = work.plan
    notes = read_json(work.note("chosen.json"))
    account = Account.from_dict(notes["account"])
    described = {}
    for split in plan.splits:
        made = [
            Shard.from_dict(read_json(work.note(f"{split}-{shard}.json")))
            for shard in range(plan.count_shards(split))
        ]
        info = describe_set(plan, split, account, made, notes["passes"])
        described[split] = [shard.records for shard in made], info
    for split, (counts, info) in described.items():
        if not found[split].exists():
            card = render_card({**info, "records": sum(counts)})
            (work.shards(split) / CARD_FILE).write_text(card, encoding="utf-8")
            features = text_features(plan.data.row_length)
            seal_records(work.shards(split), features, counts, info)
            place_folder(work.shards(split), found[split])


def _screen(work: Work, number: int) -> None:
    """The first step, of one part."""
    work.spill.screen(number)


def _choose(work: Work) -> None:
    """The second step, of all documents: what `_fill` reads, and the account so far."""
    if work.note("chosen.json").exists():
        return
    plan, spill = work.plan, work.spill
    check_names(plan, spill.load("names"))
    indices = spill.load("index")
    every = np.concatenate(indices)
    part = np.repeat(np.arange(len(indices), dtype=np.uint32), [len(index) for index in indices])
    row = np.concatenate([np.arange(len(index), dtype=np.uint32) for index in indices])
    rank = plan.ranks[every["source"]]
    texts = Texts(rank, every["high"].copy(), every["low"].copy(), part, row)
    account = spill.account()

    def name(document: Any) -> str:
        return spill.read(int(part[document]), every[document])[0]

    def tell(reason: str, left: np.ndarray, keeper: np.ndarray | None = None) -> None:
        for number, split in enumerate(plan.splits):
            places = np.flatnonzero(left & (every["split"] == number))
            if len(places):
                stays = "" if keeper is None else name(keeper[places[0]])
                leave_out(plan, account, split, reason, len(places), name(places[0]), stays)

    itself = np.arange(len(every))
    kept = np.ones(len(every), bool)
    if plan.data.corpus.drop_copies:
        keeper = find_copies(texts)
        kept = keeper == itself
        tell("copy", ~kept, keeper)
    if plan.data.corpus.near_copies:
        keeper = _find_near(spill, texts, np.flatnonzero(kept))
        kept &= keeper == itself
        tell("near", keeper != itself, keeper)
    sizes = np.bincount(every["source"][kept], every["characters"][kept], len(plan.sources))
    passes = choose_passes(plan, dict(enumerate(sizes.astype(int).tolist())))
    survivors = np.flatnonzero(kept)
    split = every["split"][survivors]
    drawn = np.where(split == 0, np.array(passes)[every["source"][survivors]], 1.0)
    which, keys = spread_passes(texts.high[survivors], texts.low[survivors], drawn)
    never = np.zeros(len(every), bool)
    never[np.delete(survivors, which)] = True
    tell("passes", never)
    which, split = survivors[which], split[which]
    counts = np.array([plan.count_shards(split) for split in plan.splits])
    shard = (np.cumsum(counts) - counts)[split] + choose_shard(texts.high[which], counts[split])
    order = np.lexsort((texts.low[which], keys, shard))
    chosen = np.empty(len(order), _CHOSEN)
    chosen["part"], chosen["row"] = part[which[order]], row[which[order]]
    write_array(work.note("chosen.npy"), chosen)
    starts = np.searchsorted(shard[order], np.arange(counts.sum() + 1)).tolist()
    notes = {"starts": starts, "passes": passes, "account": account.to_dict()}
    write_json(work.note("chosen.json"), notes)


def _find_near(spill: Spill, texts: Texts, survivors: np.ndarray) -> np.ndarray:
    """For each document the one that is kept in its place; only survivors are looked at."""
    keeper = np.arange(len(texts.high))
    keys, signatures = spill.load("keys"), spill.load("signatures")
    for band in range(keys[0].shape[1]):
        column = np.concatenate([key[:, band] for key in keys])[survivors]
        for group in find_groups(column):
            members = survivors[group]
            signed = np.stack([signatures[texts.part[m]][texts.place[m]] for m in members])
            some = Texts(*(getattr(texts, field.name)[members] for field in fields(Texts)))
            found = members[find_near_copies(some, signed, spill.plan.data.corpus.near_copies)]
            keeper[members] = np.where(keeper[members] == members, found, keeper[members])
    return keeper


def _fill(work: Work, split: str, shard: int) -> None:
    """The third step, of one shard."""
    plan, spill = work.plan, work.spill
    if work.note(f"{split}-{shard}.json").exists():
        return
    before = itertools.takewhile(lambda name: name != split, plan.splits)
    place = sum(map(plan.count_shards, before)) + shard
    start, end = read_json(work.note("chosen.json"))["starts"][place : place + 2]
    chosen = np.load(work.note("chosen.npy"), mmap_mode="r")[start:end]
    index = functools.lru_cache(maxsize=256)(functools.partial(spill.load_part, "index"))

    def read() -> Iterator[Chosen]:
        for part, row in chosen.tolist():
            entry = index(part)[row]
            yield Chosen(int(entry["source"]), *spill.read(part, entry))

    path = work.shards(split) / shard_name(shard, plan.count_shards(split))
    made = fill_shard(path, read(), plan.tokenizer, plan.data)
    write_json(work.note(f"{split}-{shard}.json"), made.to_dict())


Task = Callable[..., None]
Run = Callable[[str, Task, Sequence[tuple[Any, ...]]], None]


@contextlib.contextmanager
def _start_workers(work: Work, tasks: int) -> Iterator[Run]:
    """Runs tasks in processes, or in this one where there is little to do."""
    size = sum(file["bytes"] for files in work.plan.files for file in files)
    useful = len(os.sched_getaffinity(0))
    count = min(tasks, work.plan.data.workers or min(useful, -(-size // _WORKER_BYTES)))
    if count <= 1:

        def run_here(title: str, task: Task, arguments: Sequence[tuple[Any, ...]]) -> None:
            for values in tqdm(arguments, desc=title, unit="part", disable=None):
                task(work, *values)

        yield run_here
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), _begin_worker, (work,)
    )

    def run(title: str, task: Task, arguments: Sequence[tuple[Any, ...]]) -> None:
        futures = [pool.submit(_run_task, task, values) for values in arguments]
        done = concurrent.futures.as_completed(futures)
        try:
            for future in tqdm(done, title, len(futures), unit="part", disable=None):
                future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, perhaps for want of memory; the same command goes on "
                "(--config.data.workers=1 wants the least)"
            ) from error

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Work  # what a worker process works on


def _begin_worker(work: Work) -> None:
    global _worker
    _worker = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are other processes for that
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a parent that was killed would leave its workers behind
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run_task(task: Task, values: tuple[Any, ...]) -> None:
    task(_worker, *values)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Makes a folder and works in it alone: another process with the same plan waits here."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)  # whoever held it may have tidied up
        yield


@contextlib.contextmanager
def _naming_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(
            f"{folder}: {error.strerror}; finished parts are kept: make room, and the same command "
            "goes on from there"
        ) from error
