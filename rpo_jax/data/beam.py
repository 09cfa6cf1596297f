"""Text records made by Apache Beam (extra `beam`), on one machine or on Dataflow.

The steps are those of `rpo_jax.data.local`, the shuffles Beam's: the same functions see the same
documents, and the record files are the same bytes. No step wants more memory than the text of a
shard, or the signatures of documents that share one band key.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from rpo_jax.data.copies import Texts, choose_shard, find_copies, find_near_copies
from rpo_jax.data.corpus import Document
from rpo_jax.data.filling import Chosen, fill_shard
from rpo_jax.data.local import Work, find_sets, hold, open_work, seal_sets
from rpo_jax.data.naming import name_clash
from rpo_jax.data.overlap import band_keys
from rpo_jax.data.records import shard_name
from rpo_jax.data.screening import Account, Found
from rpo_jax.data.textplan import (
    Plan,
    choose_passes,
    drop_reasons,
    leave_out,
    screen_part,
    spread_passes,
)
from rpo_jax.errors import UserError, say_install
from rpo_jax.writing import in_bucket, write_json

# Split, reason and place of what a step leaves out; its id, and that of what stays instead.
Left = tuple[str, str, tuple[int, int], str, str]
Place = tuple[int, int]
Clash = tuple[Place, str, str, str]
ShardKey = tuple[str, int]


def make_sets_with_beam(plan: Plan, folder: Path, options: Sequence[str]) -> dict[str, Path]:
    """The record sets of a plan by split, as `rpo_jax.data.local.make_sets` makes them.

    Args:
        plan: what to make.
        folder: of the record sets, on this machine.
        options: of the pipeline, as on Beam's command line. Where its `temp_location` is a bucket,
            workers write the record files there, and this process fetches them.

    Raises:
        UserError: Beam is not installed, or too much is left out.
    """
    try:
        from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
    except ImportError as error:
        raise UserError(f"--beam wants Apache Beam: {say_install('beam')}") from error
    found = find_sets(plan, folder)
    work = open_work(plan, folder)
    with hold(work.folder):
        if not all(directory.exists() for directory in found.values()):
            parsed = PipelineOptions(list(options))
            bucket = parsed.view_as(GoogleCloudOptions).temp_location or ""
            shared = epath.Path(bucket if in_bucket(bucket) else work.folder) / "beam"
            shared = shared / plan.fingerprint[:16]
            shared.mkdir(parents=True, exist_ok=True)
            try:
                _run(plan, shared, parsed)
            except UserError as error:
                told, _, _step = str(error).partition(" [while running ")  # which Beam adds
                raise UserError(told) from error
            _fetch(work, shared)
            seal_sets(work, found)
        shutil.rmtree(work.folder)
    return found


def _run(plan: Plan, shared: epath.Path, options: Any) -> None:
    import apache_beam as beam

    tag = beam.pvalue.TaggedOutput
    with beam.Pipeline(options=options) as pipeline:
        parts = pipeline | "Parts" >> beam.Create(range(len(plan.parts))) | beam.Reshuffle()
        screened = parts | "Read and screen" >> beam.FlatMap(_screen, plan, tag).with_outputs(
            "account", "name", main="kept"
        )
        _ = (
            screened.name
            | "By name" >> beam.GroupByKey()
            | "Same name" >> beam.FlatMap(_find_clash)
            | "First clash" >> beam.combiners.Top.Smallest(1)
            | "Check names" >> beam.Map(_refuse_clash)
        )
        kept, lefts = screened.kept, []
        if plan.data.corpus.drop_copies:
            step = (
                kept
                | "By text" >> beam.Map(lambda document: (document.key, document))
                | "Same text" >> beam.GroupByKey()
                | "Drop copies"
                >> beam.FlatMap(_drop_copies, plan, tag).with_outputs("left", main="kept")
            )
            kept = step.kept
            lefts.append(step.left)
        if plan.data.corpus.near_copies:
            near = (
                kept
                | "By band key" >> beam.FlatMap(_sign)
                | "Same band key" >> beam.GroupByKey()
                | "Find near copies" >> beam.FlatMap(_find_near, plan)
            )
            step = (
                (kept | "By place" >> beam.Map(lambda document: (document.place, document)), near)
                | "With near copies" >> beam.CoGroupByKey()
                | "Drop near copies"
                >> beam.FlatMap(_drop_near, tag).with_outputs("left", main="kept")
            )
            kept = step.kept
            lefts.append(step.left)
        characters = (
            kept
            | "Characters" >> beam.Map(lambda document: (document.source, len(document.text)))
            | "By source" >> beam.CombinePerKey(sum)
        )
        spread = kept | "Spread passes" >> beam.FlatMap(
            _spread, plan, tag, beam.pvalue.AsDict(characters)
        ).with_outputs("left", main="kept")
        lefts.append(spread.left)
        empty = [
            ((split, shard), None)
            for split in plan.splits
            for shard in range(plan.count_shards(split))
        ]
        _ = (
            (spread.kept, pipeline | "Shards" >> beam.Create(empty))
            | "All shards" >> beam.Flatten()
            | "By shard" >> beam.GroupByKey()
            | "Fill" >> beam.Map(_fill, plan, shared)
        )
        accounts = screened.account | "Accounts" >> beam.combiners.ToList()
        left = (
            lefts
            | "All left out" >> beam.Flatten()
            | "By reason" >> beam.Map(lambda left: (left[:2], left[2:]))
            | "Same reason" >> beam.GroupByKey()
            | "Count" >> beam.Map(_count)
            | "Counts" >> beam.combiners.ToList()
        )
        _ = (
            pipeline
            | "Account" >> beam.Create([None])
            | beam.Map(
                _write_account,
                plan,
                shared,
                beam.pvalue.AsSingleton(accounts),
                beam.pvalue.AsSingleton(left),
                beam.pvalue.AsDict(characters),
            )
        )


def _screen(number: int, plan: Plan, tag: Any) -> Iterator[Any]:
    account, names = Account(), list[tuple[tuple[str, str], str]]()

    def meet(split: str, document: Document) -> None:
        names.append(((split, document.id), document.where))

    yield from screen_part(plan, number, account, meet)
    for place, (name, where) in enumerate(names):
        yield tag("name", (name, ((number, place), where)))
    yield tag("account", (number, account))


def _find_clash(group: tuple[tuple[str, str], Iterable[tuple[Place, str]]]) -> Iterator[Clash]:
    """Where a name stands for the second time, and for the first."""
    (_, name), found = group
    places = sorted(found)[:2]
    if len(places) == 2:
        (_, first), (place, second) = places
        yield place, name, first, second


def _refuse_clash(clashes: Sequence[Clash]) -> None:
    for _place, name, first, second in clashes:
        raise name_clash(name, first, second)


def _texts(plan: Plan, documents: Sequence[Found]) -> Texts:
    return Texts(
        plan.ranks[[document.source for document in documents]],
        np.array([document.high for document in documents], np.uint64),
        np.array([document.low for document in documents], np.uint64),
        np.array([document.place[0] for document in documents], np.uint32),
        np.array([document.place[1] for document in documents], np.uint32),
    )


def _drop_copies(group: tuple[Any, Iterable[Found]], plan: Plan, tag: Any) -> Iterator[Any]:
    documents = sorted(group[1], key=lambda document: document.place)
    for document, keeper in zip(documents, find_copies(_texts(plan, documents)), strict=True):
        stays = documents[keeper]
        if stays is document:
            yield document
        else:
            yield tag("left", (document.split, "copy", document.place, document.id, stays.id))


def _sign(document: Found) -> Iterator[tuple[tuple[int, str], tuple[Found, np.ndarray]]]:
    """A document without its text, for each of its band keys."""
    signature = document.sign()
    light = replace(document, text="")
    for band, key in enumerate(band_keys(signature).tolist()):
        yield (band, f"{key:016x}"), (light, signature)


def _find_near(
    group: tuple[tuple[int, str], Iterable[tuple[Found, np.ndarray]]], plan: Plan
) -> Iterator[tuple[tuple[int, int], tuple[int, str]]]:
    """Places of near copies, with the band that told and the document that stays."""
    (band, _), members = group
    members = sorted(members, key=lambda member: member[0].place)
    documents = [document for document, _ in members]
    signatures = np.stack([signature for _, signature in members])
    least = plan.data.corpus.near_copies
    keepers = find_near_copies(_texts(plan, documents), signatures, least)
    for place, keeper in enumerate(keepers):
        if keeper != place:
            yield documents[place].place, (band, documents[keeper].id)


def _drop_near(group: tuple[Any, tuple[Iterable[Found], Iterable[Any]]], tag: Any) -> Iterator[Any]:
    (document,), near = group[1]
    if not near:
        yield document
        return
    _, stays = min(near)
    yield tag("left", (document.split, "near", document.place, document.id, stays))


def _spread(document: Found, plan: Plan, tag: Any, characters: Mapping[int, int]) -> Iterator[Any]:
    passes = choose_passes(plan, characters)[document.source] if document.split == "train" else 1.0
    texts = _texts(plan, [document])
    _, keys = spread_passes(texts.high, texts.low, np.array([passes]))
    if not len(keys):
        yield tag("left", (document.split, "passes", document.place, document.id, ""))
    (shard,) = choose_shard(texts.high, np.array([plan.count_shards(document.split)])).tolist()
    for key in keys.tolist():
        yield (document.split, shard), (key, document)


def _fill(
    group: tuple[ShardKey, Iterable[tuple[int, Found] | None]], plan: Plan, shared: epath.Path
) -> None:
    (split, shard), members = group
    passes = sorted(
        (member for member in members if member is not None),
        key=lambda member: (member[0], member[1].low, member[1].place),
    )
    chosen = (Chosen(found.source, found.id, found.text) for _, found in passes)
    name = shard_name(shard, plan.count_shards(split))
    made = fill_shard(shared / f"{split}-{name}", chosen, plan.tokenizer, plan.data)
    write_json(shared / f"{split}-{shard}.json", made.to_dict())


def _count(group: tuple[tuple[str, str], Iterable[Any]]) -> tuple[tuple[str, str], int, Any]:
    """Split and reason, how many, and the first of them."""
    found = list(group[1])
    return group[0], len(found), min(found)


def _write_account(
    _: None,
    plan: Plan,
    shared: epath.Path,
    accounts: Sequence[tuple[int, Account]],
    counts: Sequence[tuple[tuple[str, str], int, Any]],
    characters: Mapping[int, int],
) -> None:
    account = Account()
    for _number, part in sorted(accounts, key=lambda item: item[0]):
        account.add(part)
    order = {name: i for i, name in enumerate((*drop_reasons(plan), *plan.splits))}
    for (split, reason), count, (_place, left, stays) in sorted(
        counts, key=lambda item: (order[item[0][1]], order[item[0][0]])
    ):
        leave_out(plan, account, split, reason, count, left, stays)
    notes = {"passes": choose_passes(plan, characters), "account": account.to_dict()}
    write_json(shared / "chosen.json", notes)


def _fetch(work: Work, shared: epath.Path) -> None:
    """Brings what the workers wrote to where sets are sealed."""
    plan = work.plan
    names = {shared / "chosen.json": work.note("chosen.json")}
    for split in plan.splits:
        work.shards(split).mkdir(exist_ok=True)
        count = plan.count_shards(split)
        for shard in range(count):
            name = shard_name(shard, count)
            names[shared / f"{split}-{name}"] = work.shards(split) / name
            names[shared / f"{split}-{shard}.json"] = work.note(f"{split}-{shard}.json")
    for source, target in names.items():
        source.copy(target, overwrite=True)
    shared.rmtree()
