"""What is written is there whole or not at all."""

import errno
import resource

import numpy as np
import pytest

from rpo_jax.writing import draft_folder, open_whole, write_array, write_json, write_whole


@pytest.fixture
def small_disk():
    """Files of at most 50 kB."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_whole(path, "あ" * 20_000),
        lambda path: write_json(path, ["あ"] * 20_000),
        lambda path: write_array(path, np.zeros(20_000)),
    ],
    ids=["text", "json", "array"],
)
def test_a_full_disk_leaves_what_was_there_and_says_why(tmp_path, small_disk, write):
    write_whole(tmp_path / "file", "before")
    with pytest.raises(OSError) as refused:
        write(tmp_path / "file")
    assert refused.value.errno == errno.EFBIG
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_several_may_write_the_same_file(tmp_path):
    with open_whole(tmp_path / "file") as one, open_whole(tmp_path / "file") as other:
        one.write(b"one")
        other.write(b"other")
    assert (tmp_path / "file").read_bytes() == b"one"  # the last that ended
    assert len(list(tmp_path.iterdir())) == 1


def test_values_come_back(tmp_path):
    write_json(tmp_path / "value.json", {"名": [1, None]})
    assert (tmp_path / "value.json").read_text() == '{\n  "名": [\n    1,\n    null\n  ]\n}\n'
    write_array(tmp_path / "array.npy", np.arange(3))
    assert np.load(tmp_path / "array.npy").tolist() == [0, 1, 2]


def test_a_folder_that_fails_is_not_there(tmp_path):
    with pytest.raises(ValueError), draft_folder(tmp_path / "a" / "folder") as draft:
        (draft / "file").touch()
        raise ValueError
    assert not list((tmp_path / "a").iterdir())
    with draft_folder(tmp_path / "a" / "folder") as draft:
        (draft / "file").touch()
        write_whole(tmp_path / "beside", b"")
        (tmp_path / "a" / "folder" / "other").mkdir(parents=True)  # somebody was faster
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["folder", "other"]
