"""Record sets: what is written is read, whole or not at all, and damage is named."""

import json
import subprocess
import sys

import numpy as np
import pytest

from rpo_jax.data.records import (
    digest,
    open_records,
    pair_features,
    text_features,
    write_records,
)
from rpo_jax.errors import UserError


def ids(*tokens):
    return np.array(tokens, np.int32)


def make_pairs(count):
    return [
        {
            "id": f"質問-{i}",
            "prompt_ids": ids(*range(1, 2 + i % 5)),
            "chosen_ids": ids(i, 151643),
            "rejected_ids": ids(i, i, 151643),
        }
        for i in range(count)
    ]


def describe():
    return {"fingerprint": "f" * 64, "note": "架空"}


@pytest.fixture
def pair_set(tmp_path):
    return write_records(tmp_path / "pairs", pair_features(), make_pairs(50), describe)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_pairs_come_back_in_order(pair_set):
    assert len(pair_set) == 50 and pair_set.fingerprint == "f" * 64
    for found, wanted in zip(pair_set, make_pairs(50), strict=True):
        assert_equal(found, wanted)
    again = open_records(pair_set.directory)
    assert_equal(again[49], make_pairs(50)[49])
    assert again.info["note"] == "架空" and again.info["records"] == 50


def test_rows_come_back(tmp_path):
    rows = [
        {"tokens": ids(i, 151664, 0), "segment_ids": ids(1, 1, 0), "documents": "a"}
        for i in range(20)
    ]
    records = write_records(tmp_path / "rows", text_features(3), iter(rows), describe)
    for found, wanted in zip(records, rows, strict=True):
        assert_equal(found, wanted)


def test_the_same_records_are_the_same_bytes(tmp_path, pair_set):
    again = write_records(tmp_path / "again", pair_features(), make_pairs(50), describe)
    for name in pair_set.info["shards"]:
        one, two = (records.directory / name for records in (pair_set, again))
        assert one.read_bytes() == two.read_bytes()


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    def broken():
        yield from make_pairs(3)
        raise UserError("line 4")

    with pytest.raises(UserError, match="line 4"):
        write_records(tmp_path / "data" / "pairs", pair_features(), broken(), describe)
    assert list((tmp_path / "data").iterdir()) == []


def test_two_writers_of_one_set_do_not_collide(pair_set):
    again = write_records(pair_set.directory, pair_features(), make_pairs(50), describe)
    assert len(again) == 50
    assert [path.name for path in pair_set.directory.parent.iterdir()] == ["pairs"]


def shard(records):
    (name,) = records.info["shards"]
    return records.directory / name


def truncate(records):
    content = shard(records).read_bytes()
    shard(records).write_bytes(content[: len(content) // 2])
    return shard(records).name


def remove(records):
    shard(records).unlink()
    return shard(records).name


def blank(records):
    shard(records).write_bytes(bytes(shard(records).stat().st_size))
    return shard(records).name


def miscount(records):
    path = records.directory / "dataset.json"
    info = json.loads(path.read_text())
    info["shards"][shard(records).name]["records"] += 1
    path.write_text(json.dumps(info))
    return "50 records, 51 were written"


def lose_info(records):
    (records.directory / "dataset.json").unlink()
    return "dataset.json is missing"


def break_info(records):
    path = records.directory / "dataset.json"
    path.write_text(path.read_text()[:-20])
    return "dataset.json: damaged"


def age(records):
    path = records.directory / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    return "format 0"


def lose_features(records):
    (records.directory / "features.json").unlink()
    return str(records.directory)


@pytest.mark.parametrize(
    "damage",
    [truncate, remove, blank, miscount, lose_info, break_info, age, lose_features],
    ids=lambda damage: damage.__name__,
)
def test_damage_is_named(pair_set, damage):
    wanted = damage(pair_set)
    with pytest.raises(UserError) as caught:
        open_records(pair_set.directory)
    assert wanted in str(caught.value) and str(pair_set.directory) in str(caught.value)


def test_a_flipped_bit_does_not_pass_for_data(tmp_path):
    rows = [{"tokens": ids(*range(i, i + 64))} for i in range(200)]
    features = {"tokens": text_features(64)["tokens"]}
    records = write_records(tmp_path / "rows", features, rows, describe)
    content = bytearray(shard(records).read_bytes())
    content[10_000] ^= 0x10  # in the middle of the records
    shard(records).write_bytes(content)
    damaged = open_records(records.directory)  # reads no record yet
    with pytest.raises(UserError, match=r"record \d+ is damaged"):
        list(damaged)


def test_tensorflow_stays_out():
    code = "import sys, rpo_jax.data.records; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": ["架"]}) == digest({"b": ["架"], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
