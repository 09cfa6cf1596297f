"""Several processes are one run: the same losses, one end, and each trouble named."""

import contextlib
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from rpo_jax.errors import PassingError, UserError
from rpo_jax.sharding.mesh import make_mesh
from rpo_jax.sharding.rules import find_own_rows
from rpo_jax.training.distributed import find_place, joined, read_cluster
from rpo_jax.training.meeting import Place, meet
from tests.processes import REPO, find_ports, finish, start
from tests.test_train import BASE, RPO, base_overrides, count_losses, losses, rpo_overrides, run
from tests.tiny import MESHES, make_config


@pytest.fixture(scope="session")
def workdir(make_once):
    """As in test_train: a folder with a finished base run, made by one process."""
    return make_once("workdir", lambda folder: run(BASE, base_overrides(folder)))


def train(*arguments, config=BASE):
    return ["rpo_jax.train", f"--config={config}", *arguments]


def assert_same_losses(one, other):
    assert one.keys() == other.keys()
    for step in one:
        np.testing.assert_allclose(one[step], other[step], rtol=1e-5)


def succeed(processes):
    said = finish(processes)
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert "Involuntary full rematerialization" not in errors
    return said


@pytest.mark.full
def test_two_processes_give_the_losses_of_one(workdir, tmp_path):
    said = succeed(start(2, train(*base_overrides(tmp_path))))
    folder = tmp_path / "fictional-base"
    assert_same_losses(losses(folder), losses(workdir / "fictional-base"))
    # process 0 speaks for both
    assert "held out" in said[0][0] and "held out" not in said[1][0]
    assert "step 40/40" in said[0][1] and "step" not in said[1][1]
    assert not list(tmp_path.glob(".seen-*"))


@pytest.mark.full
def test_four_processes_prefer_as_one_does(workdir, tmp_path):
    """One device each: the two of a `tensor` pair hold the same rows."""

    def arguments(name, **more):
        named = f"{name}-{tmp_path.name}"
        return rpo_overrides(workdir, name=named, train__steps=6, train__eval_every_steps=3, **more)

    run(RPO, arguments("one"))
    for path in (workdir / "data").glob("pairs-*/reference-*.npy"):
        path.unlink()
    succeed(start(4, train(*arguments("four"), config=RPO)))
    one, four = (losses(workdir / f"{name}-{tmp_path.name}") for name in ("one", "four"))
    assert_same_losses(one, four)


def wait_for(folder, steps, processes):
    deadline = time.monotonic() + 900
    while count_losses(folder) < steps:
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline
        time.sleep(0.005)


LONG = {"train__steps": 2000, "optim__schedule": "constant", "checkpoint__save_every_steps": 1000}


@pytest.mark.full
def test_a_notice_to_one_stops_all_at_one_step_and_other_processes_go_on(tmp_path):
    arguments = {name: base_overrides(tmp_path, name=name, train__steps=300) for name in "ab"}
    # Measuring after each step, the first run is slow enough not to be over before the notice.
    processes = start(2, train(*arguments["a"], "--config.train.eval_every_steps=1"))
    wait_for(tmp_path / "a", 12, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], said
    (stopped,) = {int(re.search(r"SIGTERM: stopped at step (\d+), saved", e)[1]) for _, e in said}
    assert stopped < 300 and (tmp_path / "a" / "checkpoints" / str(stopped)).is_dir()
    # One process goes on for two, on other devices, as if nothing had been.
    for name in "ab":
        run(BASE, arguments[name])
    assert_same_losses(losses(tmp_path / "b"), losses(tmp_path / "a"))


@pytest.mark.full
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_is_named_by_the_others(tmp_path, killed):
    processes = start(2, train(*base_overrides(tmp_path, **LONG)))
    wait_for(tmp_path / "fictional-base", 4, processes)
    began = time.monotonic()
    processes[killed].kill()
    said = finish(processes)
    assert time.monotonic() - began < 120  # long before the five minutes of jax's own waits
    other, errors = processes[1 - killed], said[1 - killed][1]
    # Without process 0 jax aborts too, at the same moment, and may be the first to speak.
    assert other.returncode in ((75, -signal.SIGABRT) if killed == 0 else (75,)), errors
    name = f"process {killed} ({socket.gethostname()}, pid {processes[killed].pid})"
    jax_spoke = "JAX distributed service detected fatal errors" in errors
    told = f"error: {name} is gone; the same command" in errors
    assert told or (killed == 0 and jax_spoke), errors


@pytest.mark.full
@pytest.mark.parametrize(
    ("fields", "mistake"),
    [
        ({"train__batch_rows": 3}, "train.batch_rows=3 in train.micro_batches=1 parts is 3 rows"),
        ({"tokenizer__path": "nowhere"}, "tokenizer.path=nowhere: no such tokenizer"),
    ],
    ids=["that each finds", "that process 0 finds"],
)
def test_a_mistake_in_one_process_ends_all(tmp_path, fields, mistake):
    processes = start(2, train(*base_overrides(tmp_path, **fields)))
    for process, (_, errors) in zip(processes, finish(processes), strict=True):
        assert process.returncode == 2, errors  # which launchers do not try again
        assert mistake in errors
        assert "Check failure" not in errors and "the same command" not in errors


ENDING = """
import os, signal, sys, time
from pathlib import Path
from rpo_jax.training.meeting import Place, meet

folder, port, index, end = sys.argv[1:]
place = Place("localhost", int(port), 3, int(index))
met = meet(place, {"name": f"host-{index}"}, Path(folder), 60.0)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end != "waits":
    met.abandon("for a reason", int(end))
    os._exit(int(end))
time.sleep(60)
"""


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ("2", 2, "ended: for a reason\n"),
        ("75", 75, "ended: for a reason; the same command"),
        ("1", 1, "ended: for a reason; the same command"),
        ("killed", 75, "is gone; the same command"),
    ],
)
def test_the_others_end_with_the_status_of_the_first(tmp_path, first, end, status, told):
    command = [sys.executable, "-c", ENDING, str(tmp_path), str(find_ports())]
    processes = [
        subprocess.Popen(
            [*command, str(index), end if index == first else "waits"],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    for index, (_, errors) in enumerate(finish(processes, timeout=120)):
        if index != first:
            assert processes[index].returncode == status, errors
            assert f"error: process {first} (host-{first}) {told}" in errors


@pytest.mark.full
def test_a_command_that_differs_is_named(tmp_path):
    arguments = train(*base_overrides(tmp_path))
    processes = start(2, arguments, [], ["--config.optim.learning_rate=0.5"])
    for process, (_, errors) in zip(processes, finish(processes), strict=True):
        assert process.returncode == 2
        assert re.search(
            r"error: processes: process 1 \(\S+, pid \d+\) has config.optim.learning_rate 0.5, "
            r"process 0 \(\S+, pid \d+\) 0.003\n",
            errors,
        )


@pytest.mark.full
def test_other_code_and_other_versions_are_named(tmp_path):
    shutil.copytree(REPO / "rpo_jax", tmp_path / "rpo_jax")
    with (tmp_path / "rpo_jax/errors.py").open("a") as file:
        file.write("# a later commit\n")
    other = tmp_path / "optax-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n")
    # Its own folder comes before that of the command.
    last_env = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    processes = start(2, train(*base_overrides(tmp_path)), last_env=last_env)
    for process, (_, errors) in zip(processes, finish(processes), strict=True):
        assert process.returncode == 2
        name = r"processes: process 1 \(\S+, pid \d+\) has"
        assert re.search(
            rf"{name} code '\w{{16}}', process 0 \(\S+, pid \d+\) '\w{{16}}'\n", errors
        )
        assert re.search(rf"{name} optax '0\.0\.1', process 0 \(\S+, pid \d+\) '", errors)


@pytest.mark.full
def test_a_host_that_does_not_come_is_named_in_time(tmp_path):
    began = time.monotonic()
    arguments = train(*base_overrides(tmp_path), "--timeout_s=20")
    processes = start(3, arguments, absent={1})
    for process, (_, errors) in zip(processes, finish(processes), strict=True):
        assert process.returncode == 75  # another try may find it
        assert "processes: 2 of 3 processes are here after 20 s: process 0 (" in errors
        assert "; missing: process 1\n" in errors
    assert time.monotonic() - began < 120


def meet_all(folder, *facts, count=None, timeout_s=20.0, indices=None, tell=str):
    """What each of several meetings says: the names, or the problem as `tell` has it."""
    port = find_ports()

    def one(index, mine):
        place = Place("localhost", port, count or len(facts), index)
        try:
            return meet(place, {"name": f"host-{index}", **mine}, folder, timeout_s)
        except UserError as error:
            return tell(error)

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, indices or range(len(facts)), facts))


def test_processes_that_are_alike_meet_and_part(tmp_path):
    meetings = meet_all(tmp_path / "new", *[{"code": "a", "years": (1, 2)}] * 3)
    wanted = {index: f"process {index} (host-{index})" for index in range(3)}
    assert [meeting.names for meeting in meetings] == [wanted] * 3
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda meeting: meeting.leave(), meetings))
    assert "meeting" not in {thread.name for thread in threading.enumerate()}
    assert not list((tmp_path / "new").iterdir())


def test_those_who_differ_are_named_in_all_processes(tmp_path):
    said = meet_all(tmp_path, {"code": "a", "jax": "1"}, {"code": "b"}, {"code": "a", "jax": "1"})
    assert (
        said
        == [
            "processes: process 1 (host-1) has code 'b', process 0 (host-0) 'a'\n"
            "processes: process 1 (host-1) has jax None, process 0 (host-0) '1'"
        ]
        * 3
    )


def test_those_who_do_not_come_are_named_in_time(tmp_path):
    began = time.monotonic()
    said = meet_all(tmp_path, {}, {}, count=4, timeout_s=3.0, indices=[0, 2])
    assert time.monotonic() - began < 60
    here = "process 0 (host-0), process 2 (host-2)"
    absent = "missing: process 1, process 3"
    assert said == [f"processes: 2 of 4 processes are here after 3 s: {here}; {absent}"] * 2
    (alone,) = meet_all(tmp_path, {}, count=2, timeout_s=0.5, indices=[1])
    assert re.match(r"process 0 does not answer at localhost:\d+ after 0.5 s \(", alone)


def status(error):
    return error.status


@pytest.mark.parametrize(
    ("facts", "more", "statuses"),
    [
        ([{}, {}], {"count": 3}, [75, 75]),
        ([{}], {"count": 2, "indices": [1]}, [75]),
        ([{}, {"code": "b"}], {}, [2, 2]),
    ],
    ids=["late", "without process 0", "differ"],
)
def test_the_status_tells_whether_another_try_may_help(tmp_path, facts, more, statuses):
    assert meet_all(tmp_path, *facts, timeout_s=2.0, tell=status, **more) == statuses


def test_a_port_that_is_taken_may_be_free_later(tmp_path):
    port = find_ports()
    with socket.create_server(("", port)), pytest.raises(PassingError, match=f"port {port} of"):
        meet(Place("localhost", port, 2, 0), {"name": "a"}, tmp_path, 5.0)


def connect(port):
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def say_hello(port, index, name):
    """The connection of a process that has said who it is."""
    connected = connect(port)
    hello = {"index": index, "facts": {"name": name}}
    connected.sendall(json.dumps(hello).encode() + b"\n")
    return connected


def test_a_process_that_starts_again_is_waited_for(tmp_path):
    port = find_ports()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, Place("localhost", port, 3, 0), {"name": "a"}, tmp_path, 20.0)
        say_hello(port, 1, "b, killed").close()
        with say_hello(port, 1, "b, again") as again:
            again.sendall(b'{"seen": true}\n')
            say_hello(port, 2, "c, killed").close()  # and does not come again
            said = first.exception()
    assert str(said) == "processes: process 2 (c, killed) is gone before the run began"
    assert said.status == 75


def test_a_process_whose_mount_hangs_is_named_in_time(tmp_path):
    port = find_ports()
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(meet, Place("localhost", port, 3, index), {"name": "a"}, tmp_path, 3.0)
            for index in range(2)
        ]
        with say_hello(port, 2, "b"):  # and never says what it sees
            said = [call.exception() for call in calls]
    wanted = "processes: process 2 (b) has not said after 3 s whether it sees "
    assert [str(each) for each in said] == [f"{wanted}{tmp_path}; does its mount hang?"] * 2
    assert [each.status for each in said] == [75, 75]


def test_process_0_is_named_when_it_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr("rpo_jax.training.meeting._HELLO_S", 0.5)
    port = find_ports()
    with (
        socket.create_server(("", port)),
        pytest.raises(PassingError, match=f"process 0 at localhost:{port} says nothing for 1 s"),
    ):
        meet(Place("localhost", port, 2, 1), {"name": "b"}, tmp_path, 0.5)


def test_a_folder_that_cannot_be_is_a_mistake_in_all_processes(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "runs"
    wanted = f"processes: process 0 (host-0) cannot write to {folder}: Not a directory"
    assert meet_all(folder, {}, {}) == [wanted] * 2
    assert meet_all(folder, {}, {}, tell=status) == [2, 2]


def test_a_process_does_not_take_itself_for_another(tmp_path, monkeypatch):
    def meet_itself(address, timeout):
        line = socket.socket()
        at_once = struct.pack("ii", 1, 0)  # closed, it leaves the port
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        line.bind(address)
        line.connect(address)
        return line

    monkeypatch.setattr(socket, "create_connection", meet_itself)
    (alone,) = meet_all(tmp_path, {}, count=2, timeout_s=0.5, indices=[1])
    assert re.match(r"process 0 does not answer at .* \(nobody listens there\)", alone)


def test_two_of_one_index_are_refused(tmp_path):
    said = meet_all(tmp_path, {}, {}, {}, indices=[0, 1, 1])
    assert "two say that they are process 1: host-1 and host-1" in said[0]


def test_strangers_do_not_disturb(tmp_path):
    port = find_ports()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, Place("localhost", port, 2, 0), {"name": "a"}, tmp_path, 20.0)
        for noise in (b"", b"GET / HTTP/1.1\r\n", b"[]\n", b'{"index": 1}\n'):
            with connect(port) as connected:
                connected.sendall(noise)
        second = pool.submit(meet, Place("localhost", port, 2, 1), {"name": "b"}, tmp_path, 20.0)
        for meeting in (first.result(), second.result()):
            pool.submit(meeting.leave)


def test_silent_strangers_cost_no_time(tmp_path):
    port = find_ports()
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as strangers:
        late = pool.submit(meet, Place("localhost", port, 3, 0), {"name": "a"}, tmp_path, 3.0)
        for _ in range(2):
            strangers.enter_context(connect(port))
        strangers.enter_context(say_hello(port, 1, "b"))
        said = str(late.exception())
    assert said.endswith("3 s: process 0 (a), process 1 (b); missing: process 2")
    assert time.monotonic() - began < 9  # one alone would be waited for for 10 s


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("0", "", "", ""), "--processes=0: a whole number is wanted"),
        (("", "host:1", "", ""), "--coordinator and --process: --processes=2 or more is wanted"),
        (("2", "", "x", ""), "--process=x: a whole number is wanted"),
        (("2", "host", "1", ""), "--coordinator=host: HOST:PORT is wanted"),
        (("2", "host:1", "", ""), "--process=: with --coordinator, a number from 0 to 1 is wanted"),
        (("2", "host:1", "2", ""), "--process=2: with --coordinator, a number from 0 to 1"),
        (("2", "", "1", ""), "--process=1: --coordinator=HOST:PORT is wanted with it"),
        (("2", "", "", ""), "--processes=2: nothing here says which of them this is"),
    ],
)
def test_flags_that_say_too_little_are_refused(flags, message, monkeypatch):
    for variable in ("KUBERNETES_SERVICE_HOST", "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match="^" + re.escape(message)):
        find_place(read_cluster(*flags))


def test_the_environment_says_which_process_this_is(monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "tpu-[03-06]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "4",
    }
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for variable, value in slurm.items():
        monkeypatch.setenv(variable, value)
    place = find_place(read_cluster("4", "", "", ""))
    assert (place.host, place.count, place.index) == ("tpu-03", 4, 2)
    with pytest.raises(UserError, match="--processes=8: the environment speaks of 4"):
        find_place(read_cluster("8", "", "", ""))


def test_one_process_joins_nothing(tmp_path):
    with joined(make_config(), read_cluster("", "", "", "")):
        assert jax.process_count() == 1


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_one_process_holds_every_row(mesh):
    assert find_own_rows(make_mesh(mesh), 16) == list(range(16))
