"""What is written is there whole or not at all."""

import errno
import fcntl
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from rpo_jax.errors import UserError
from rpo_jax.writing import draft_folder, hold, open_whole, write_array, write_json, write_whole


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


def test_what_one_process_writes_another_does_not(tmp_path):
    """Until the first has ended, also by a kill."""
    path = tmp_path / "new" / "answers.jsonl"
    code = f"""if True:
        import pathlib, time
        from rpo_jax.writing import hold
        with hold(pathlib.Path({str(path)!r})):
            print("held", flush=True)
            time.sleep(600)
    """
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=r"answers\.jsonl: another process is writing it"),
        hold(path),
    ):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    with hold(path), hold(path.with_name("others.jsonl")):
        pass
    with hold(path):  # once more
        pass


def test_where_there_are_no_locks_nobody_is_kept_away(tmp_path, monkeypatch):
    def refuse(number):
        def flock(file, how):
            raise OSError(number, "no")

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOTSUP)
    with hold(tmp_path / "x"):
        pass
    refuse(errno.EIO)
    with pytest.raises(OSError, match="no"), hold(tmp_path / "x"):
        pass
