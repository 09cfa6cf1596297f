"""Imports and exports that are killed, repeated, or shared by several hosts."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from converting import REPO, command, cut_small, export, import_, refusal, run
from etils import epath
from hub import TIED, random_tensors, read_files, write_checkpoint
from processes import find_ports
from tiny import SHAPE

from rpo_jax.config import Lora
from rpo_jax.config import Mesh as MeshConfig
from rpo_jax.errors import UserError
from rpo_jax.model.lora import init_adapters
from rpo_jax.model.qwen2 import Network, abstract_params
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import abstract_weights
from rpo_jax.weights import importing
from rpo_jax.weights.adapters import write_peft
from rpo_jax.weights.importing import Part, import_weights
from rpo_jax.weights.manifest import read_manifest
from rpo_jax.weights.source import Source, open_source
from rpo_jax.weights.workplace import hold


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


ONE_THREAD = {"XLA_FLAGS": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.full
def test_killed_and_repeated_it_ends_byte_identical(tmp_path: Path) -> None:
    shape = replace(SHAPE, num_hidden_layers=40)
    source = write_checkpoint(tmp_path / "in", shape)
    rng = np.random.default_rng(0)
    for words, target in (
        (("import", "--source", source, "--target", tmp_path / "model"), tmp_path / "model"),
        (
            (
                "export",
                "--base",
                "none",
                "--source",
                tmp_path / "model",
                "--target",
                tmp_path / "out",
            ),
            tmp_path / "out",
        ),
    ):
        kills = 0
        partial = target.parent / f"{target.name}.partial"
        while kills < 10:
            process = subprocess.Popen(command(*words), cwd=REPO, env={**os.environ, **ONE_THREAD})
            while not partial.exists() and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0 or target.exists():
                # It won the race: what it made is taken away, and it has to begin again.
                if target == tmp_path / "model":
                    run("verify", "--source", target)
                shutil.rmtree(target)
                continue
            kills += 1
        subprocess.run(command(*words), cwd=REPO, check=True)
        assert not partial.exists()
    run("verify", "--source", tmp_path / "model")
    out = read_files(tmp_path / "out")
    assert out.pop("README.md") and out == read_files(source)


def test_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    import_(source, tmp_path / "model", "--part=1/2")
    for file in ("model/.manifest.json.7", "finished/.model.norm.weight.7", ".unfinished.json.7"):
        (tmp_path / "model.partial" / file).write_text("{")
    import_(source, tmp_path / "model", "--part=2/2")
    assert not [name for name in read_files(tmp_path / "model") if "/." in f"/{name}"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".unfinished.json.7").write_text("{")
    export(tmp_path / "model", tmp_path / "out")
    out = read_files(tmp_path / "out")
    assert out.pop("README.md") and out == read_files(source)


def test_adapters_are_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Lora(rank=2)
    pairs = init_adapters(abstract_params(Network(SHAPE))["layers"], lora, jax.random.key(0))
    target = epath.Path(tmp_path / "peft")

    def write(card: bytes) -> None:
        write_peft(target, jax.device_get(pairs), lora, SHAPE, "base", {"README.md": card})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rename", stop)  # the last step
        write(b"one")
    assert not target.exists()
    with pytest.raises(UserError, match="something else"):
        write(b"two")
    write(b"one")
    assert read_files(tmp_path / "peft").keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    write(b"one")  # nothing to do
    with pytest.raises(UserError, match=r"missing or other: README\.md"):
        write(b"two")


def test_a_repeated_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recorded as finished is not read again, and not mixed with another source."""
    monkeypatch.setattr(importing, "count_threads", lambda _: 1)  # the last tensor comes last
    tensors = random_tensors(TIED)
    last = "model.norm.weight"
    good = tensors[last].copy()
    tensors[last][0] = np.nan
    source = write_checkpoint(tmp_path / "in", TIED, tensors=tensors, shards=2)
    refusal(capsys, "import", "--source", source, "--target", tmp_path / "model")
    records = tmp_path / "model.partial" / "finished"
    done = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    assert "model.embed_tokens.weight" in done and last not in done
    refusal(capsys, "import", "--source", source, "--target", tmp_path / "model")
    assert {name: (records / name).stat().st_mtime_ns for name in done} == done
    # Mended, it is another source, and so is one that differs in its values or its tokenizer alone.
    tensors[last] = good
    write_checkpoint(source, TIED, tensors=tensors, shards=2)
    message = refusal(capsys, "import", "--source", source, "--target", tmp_path / "model")
    assert "something else" in message and "model.partial" in message and "delete it" in message
    shutil.rmtree(tmp_path / "model.partial")
    import_(source, tmp_path / "model")
    run("verify", "--source", tmp_path / "model")


def test_two_hosts_write_one_folder(tmp_path: Path, small_pieces: None) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    words = ("import", "--source", source, "--target", tmp_path / "model")
    parts = [
        subprocess.Popen(command(*words, f"--part={i}/2"), cwd=REPO, stdout=subprocess.PIPE)
        for i in (2, 1)
    ]
    texts = [process.communicate(timeout=900)[0].decode() for process in parts]
    assert [process.returncode for process in parts] == [0, 0]
    assert any("parameters" in text for text in texts)
    run("verify", "--source", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    out = read_files(tmp_path / "out")
    assert out.pop("README.md") and out == read_files(source)


def test_hosts_need_not_run_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", TIED)
    for i in (1, 2, 3):
        import_(source, tmp_path / "model", f"--part={i}/3")
        assert (tmp_path / "model").exists() == (i == 3)
        assert ("parameters" in capsys.readouterr().out) == (i == 3)
    run("verify", "--source", tmp_path / "model")


class Switch:
    """Stops the one thread at work before or after its call number `at` of a file operation.

    What works there is our own code on a real disk; only the moment is chosen.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.calls = at, 0
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.flock = fcntl.flock
        places = [(os, "replace"), (os, "rename"), (os, "fsync"), (os, "open"), (os, "listdir")]
        places += [(os, "unlink"), (shutil, "rmtree")]
        for module, name in places:
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))
        monkeypatch.setattr(fcntl, "flock", self.wrap(self.lock))

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **keywords: Any) -> Any:
            self.pass_by()
            try:
                return call(*args, **keywords)
            finally:
                self.pass_by()

        return watched

    def pass_by(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.stopped.set()
            assert self.go_on.wait(60)

    def lock(self, handle: int, kind: int) -> None:
        """A lock that the stopped thread holds lets it go on; otherwise both would wait."""
        try:
            self.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if kind & fcntl.LOCK_NB:
                raise
            self.go_on.set()
            self.flock(handle, kind)


def finish_at(
    monkeypatch: pytest.MonkeyPatch, source: Source, target: Path, parts: list[Part], at: int
) -> tuple[list[bool], bool]:
    """Runs one part up to its operation number `at`, then another to its end, then the first.

    Gives what the two said, and whether the first came as far as `at`.
    """

    def import_part(part: Part) -> bool:
        return import_weights(source, epath.Path(target), 4.0, part)

    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as pool:
        switch = Switch(patched, at)
        first = pool.submit(import_part, parts[0])
        while not switch.stopped.wait(0.002) and not first.done():
            pass
        switch.at = 0  # nobody else is stopped
        try:
            second = import_part(parts[1])
        finally:
            switch.go_on.set()
        return [first.result(timeout=900), second], switch.stopped.is_set()


@pytest.mark.parametrize(
    "left",
    [
        pytest.param((1, 1), id="both"),
        pytest.param((1, 0), id="one", marks=pytest.mark.full),
        pytest.param((0, 0), id="none", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("order", [(1, 2), (2, 1)], ids=["first", "second"])
def test_parts_may_meet_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int], left: tuple[int, int]
) -> None:
    """Two parts with `left` tensors to copy, one of them stopped at each file operation in turn."""
    source = open_source(epath.Path(write_checkpoint(tmp_path / "in", TIED)))
    whole, begun = tmp_path / "whole", tmp_path / "begun.partial"
    import_weights(source, epath.Path(whole), 4.0, Part())
    assert not import_weights(source, epath.Path(tmp_path / "begun"), 4.0, Part(1, 2))
    with hold(epath.Path(begun), alone=False) as held:  # all is there, but nobody may finish
        assert held
        assert not import_weights(source, epath.Path(tmp_path / "begun"), 4.0, Part(2, 2))
    # One thread at a time: the moments are the same every time.
    monkeypatch.setattr(importing, "count_threads", lambda pieces: 1)
    ranked = sorted(source.tensors, key=lambda tensor: -source.entries[tensor.name][1].size)
    for index, count in zip(order, left, strict=True):
        for tensor in ranked[index - 1 :: 2][:count]:
            (begun / "finished" / tensor.name).unlink()
    parts = [Part(index, 2) for index in order]
    wanted = read_files(whole).keys()
    sums = read_manifest(epath.Path(whole)).sums
    at, met = 1, True
    while met:
        target = tmp_path / f"model{at}"
        shutil.copytree(begun, tmp_path / f"model{at}.partial")
        said, met = finish_at(monkeypatch, source, target, parts, at)
        assert any(said), f"stopped at {at}, nobody finished"
        assert not (tmp_path / f"model{at}.partial").exists()
        assert read_files(target).keys() == wanted
        assert read_manifest(epath.Path(target)).sums == sums
        shutil.rmtree(target)
        at += 1
    assert at > 15


RESTORE = """
import sys
import jax
import numpy as np
from pathlib import Path
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from rpo_jax.config import Mesh
from rpo_jax.model.qwen2 import Network
from rpo_jax.model.shape import load_shape
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.training.origin import load_params
from rpo_jax.training.state import abstract_weights
folder = Path(sys.argv[3])
shape = load_shape(str(folder / "model" / "config.json"))
mesh = make_mesh(Mesh(data=1, fsdp=2, seq=1, tensor=2))
wanted = abstract_weights(Network(shape, param_dtype="bfloat16"), mesh)
def count_read():
    return int(Path("/proc/self/io").read_text().split()[1])
load_params(folder, wanted)  # once, so that what Orbax imports meanwhile isn't counted
before = count_read()
_, params = load_params(folder, wanted)
Path(sys.argv[4], "read").write_text(str(count_read() - before))
for number, leaf in enumerate(jax.tree.leaves(params)):
    for shard in leaf.addressable_shards:
        where = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape)]
        data = np.asarray(shard.data).view(np.uint16)
        np.savez(f"{sys.argv[4]}/{number}-{shard.device.id}.npz", where=where, data=data)
"""


@pytest.mark.full
def test_two_processes_restore_their_own_parts(tmp_path: Path) -> None:
    """Straight onto a mesh of both, each reading its half of the bytes."""
    # Wide enough that the large arrays are cut between chunks: one that two devices of a host share
    # is read once or twice, as it happens.
    shape = replace(SHAPE, hidden_size=512, intermediate_size=8192, vocab_size=8192)
    tensors = random_tensors(shape)
    import_(write_checkpoint(tmp_path / "in", shape, tensors=tensors), tmp_path / "model")
    port = find_ports()
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    for i in range(2):
        (tmp_path / f"host{i}").mkdir()
    words = [[port, i, tmp_path / "model", tmp_path / f"host{i}"] for i in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", RESTORE, *map(str, w)], cwd=REPO, env=env)
        for w in words
    ]
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    one = make_mesh(MeshConfig(data=1, fsdp=1, seq=1, tensor=1), jax.devices()[:1])
    _, whole = load_params(
        tmp_path / "model", abstract_weights(Network(shape, param_dtype="bfloat16"), one)
    )
    half = sum(value.nbytes for value in tensors.values()) / 2
    read = [int((tmp_path / f"host{i}" / "read").read_text()) for i in range(2)]
    assert all(half <= each < 1.3 * half for each in read), [each / half for each in read]
    for number, leaf in enumerate(jax.tree.leaves(whole)):
        want = np.asarray(leaf).view(np.uint16)
        seen = np.zeros(want.shape, bool)
        for file in tmp_path.glob(f"host*/{number}-*.npz"):
            part = np.load(file)
            place = tuple(slice(*span) for span in part["where"])
            assert (part["data"] == want[place]).all()
            seen[place] = True
        assert seen.all()
