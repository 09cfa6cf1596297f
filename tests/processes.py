"""Commands in several processes, as on the hosts of a pod: CPU devices, Gloo between them."""

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DEVICES = 4  # of all processes of a run together


def start(
    count: int,
    words: list[str],
    *more: list[str],
    env: dict[str, str] | None = None,
    last_env: dict[str, str] | None = None,
    absent: Collection[int] = (),
) -> list[subprocess.Popen[str]]:
    """Starts `python -m <words>` as processes of one run; `more[i]` goes to process i alone.

    `last_env` is added to the environment of the last process; those `absent` are not started.
    """
    port = find_ports()
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={DEVICES // count}")
    env = os.environ | (env or {}) | {"XLA_FLAGS": flags}
    command = [sys.executable, "-m", *words, f"--processes={count}"]

    def begin(index: int) -> subprocess.Popen[str]:
        own = [f"--coordinator=localhost:{port}", f"--process={index}"] if count > 1 else []
        own += more[index] if index < len(more) else []
        pipe = subprocess.PIPE
        here = env | (last_env or {}) if index == count - 1 else env
        return subprocess.Popen(
            [*command, *own], cwd=REPO, env=here, stdout=pipe, stderr=pipe, text=True
        )

    return [begin(index) for index in range(count) if index not in absent]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 900) -> list[tuple[str, str]]:
    """Waits for all; what each said on stdout and stderr."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


_TURNS = itertools.count(os.getpid())


def find_ports() -> int:
    """A free port whose successor is free too.

    Both lie below those that the kernel hands out by itself: such a one may be gone before it is
    used, and who asks there before anybody listens can be connected with itself.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for turn in itertools.islice(_TURNS, 500):
        port = 20_000 + 1000 * (worker % 12) + 2 * (turn % 500)
        with socket.socket() as one, socket.socket() as next_one:
            try:
                one.bind(("", port))
                next_one.bind(("", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no two free ports")
