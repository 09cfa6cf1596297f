"""Processes meet before jax starts, are compared, and stay in touch until their run ends.

jax waits for missing processes and ends without a name, and a process that dies leaves the others
waiting inside a collective. So each holds a plain connection to process 0. Whatever closes it, the
kernel tells at once; a machine that falls silent is noticed by TCP keepalives, within a minute.
Messages are lines of JSON.
"""

import contextlib
import json
import logging
import os
import select
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rpo_jax.errors import PassingError, UserError

GONE = 1  # exit status of a process that ends because another one did
_AGAIN = "the same command, on every host, goes on from the last checkpoint"
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # seconds, seconds, times
_RETRY_S = 0.2
_HELLO_S = 10.0  # for a connection to say who it is


@dataclass(frozen=True)
class Place:
    """Which process of a run this is.

    Attributes:
        host: where process 0 is.
        port: it listens on.
        count: of processes.
        index: of this one.
    """

    host: str
    port: int
    count: int
    index: int


class Meeting:
    """The connections of a process: all others' in process 0, one to process 0 in the others."""

    def __init__(self, place: Place, names: Mapping[int, str], lines: Mapping[int, "_Line"]):
        """Watches them from now on: the process ends as soon as another one does, and says which.

        Args:
            place: of this process.
            names: of all processes, by index.
            lines: by the index of the process at their other end.
        """
        self.names = names
        self._place, self._lines, self._left = place, dict(lines), threading.Event()
        self._watch = threading.Thread(target=self._wait, daemon=True, name="meeting")
        self._watch.start()

    def leave(self) -> None:
        """The run is done, for all: no longer watches, nor is watched."""
        self._send({"left": True})
        self._watch.join()
        for line in self._lines.values():
            line.close()

    def abandon(self, why: str) -> None:
        """Tells the others that this process ends, and why; they end too."""
        self._left.set()
        self._send({"ended": f"{self.names[self._place.index]} ended: {why}"})

    def _send(self, message: dict[str, Any]) -> None:
        for line in self._lines.values():
            line.send(message)

    def _wait(self) -> None:
        """Reads until every process at the other ends has left."""
        open_lines = dict(self._lines)
        with selectors.DefaultSelector() as selector:
            for index, line in open_lines.items():
                selector.register(line.socket, selectors.EVENT_READ, index)
            while open_lines and not self._left.is_set():
                for key, _ in selector.select(timeout=1.0):
                    message = open_lines[key.data].receive()
                    if message is None:
                        message = {"ended": f"{self.names[key.data]} is gone"}
                    if "ended" in message and not self._left.is_set():
                        self._send(message)
                        _exit(message["ended"])
                    selector.unregister(key.fileobj)
                    del open_lines[key.data]


def _exit(why: str) -> None:
    """Ends the process from any thread: the main one may wait in a collective for ever."""
    logging.error("error: %s; %s", why, _AGAIN)
    os._exit(GONE)


def meet(place: Place, facts: Mapping[str, Any], shared: Path, timeout_s: float) -> Meeting:
    """Waits for all processes, and checks that they are the same and see the same folder.

    Args:
        place: of this process.
        facts: JSON values; `name` is what people call the process, all others must be equal in all
            processes.
        shared: a folder that every process has to see; made where it is not there.
        timeout_s: seconds to wait for the others.

    Raises:
        PassingError: some did not come in time, or are gone again; says which.
        UserError: some differ, or do not see the folder; says which. Either is raised in all
            processes alike.
    """
    deadline = time.monotonic() + timeout_s
    if place.index:
        return _attend(place, facts, timeout_s, deadline)
    shared.mkdir(parents=True, exist_ok=True)
    with (
        _listen(place) as server,
        tempfile.NamedTemporaryFile(prefix=".seen-", dir=shared) as marker,
    ):
        lines: dict[int, _Line] = {}
        told = {0: json.loads(json.dumps(facts))}  # tuples are lists, as for the others
        found = list(_gather(place, server, lines, told, timeout_s, deadline))
        if not found:
            found = list(_compare(told))
        if not found:
            found = list(_look_for(marker.name, lines, told))
        problems = [str(problem) for problem in found]
        again = all(isinstance(problem, PassingError) for problem in found)
        names = {index: _name(index, said) for index, said in told.items()}
        for line in lines.values():
            line.send({"problems": problems, "again": again, "names": list(names.items())})
    if problems:
        for line in lines.values():
            line.close()
        _refuse(problems, again)
    return Meeting(place, names, lines)


def _listen(place: Place) -> socket.socket:
    try:
        return socket.create_server(("", place.port))
    except OSError as error:
        raise PassingError(
            f"port {place.port} of this host cannot be had ({error}); does another run use it?"
        ) from error


def _gather(
    place: Place,
    server: socket.socket,
    lines: dict[int, "_Line"],
    told: dict[int, dict[str, Any]],
    timeout_s: float,
    deadline: float,
) -> Iterator[UserError]:
    """Fills in lines and what each process told; yields what went wrong."""
    while len(told) < place.count:
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            line = _Line(server.accept()[0])
        except TimeoutError:
            absent = sorted(set(range(place.count)) - told.keys())
            here = ", ".join(_name(index, said) for index, said in sorted(told.items()))
            yield PassingError(
                f"{len(told)} of {place.count} processes are here after {timeout_s:g} s: {here}; "
                f"missing: {', '.join(f'process {index}' for index in absent)}"
            )
            return
        hello = line.receive(_HELLO_S)
        if not hello or not {"index", "facts"} <= hello.keys():
            line.close()  # whoever that was
        elif hello["index"] in told and not _has_hung_up(lines.get(hello["index"])):
            names = f"{told[hello['index']]['name']} and {hello['facts']['name']}"
            problem = f"two say that they are process {hello['index']}: {names}"
            line.send({"problems": [problem], "again": False})
            line.close()
            yield UserError(problem)
            return
        else:
            if before := lines.get(hello["index"]):  # it was started again
                before.close()
            lines[hello["index"]], told[hello["index"]] = line, hello["facts"]


def _has_hung_up(line: "_Line | None") -> bool:
    """Whether a process that has said who it is, and has to wait now, is gone."""
    return line is not None and bool(select.select([line.socket], [], [], 0)[0])


def _compare(told: Mapping[int, dict[str, Any]]) -> Iterator[UserError]:
    """Each fact in which a process differs from process 0."""
    for index in sorted(told.keys() - {0}):
        for key in sorted(told[0].keys() | told[index].keys()):
            ours, theirs = told[0].get(key), told[index].get(key)
            if key != "name" and ours != theirs:
                yield UserError(
                    f"{_name(index, told[index])} has {key} {theirs!r}, {_name(0, told[0])} "
                    f"{ours!r}"
                )


def _look_for(
    marker: str, lines: Mapping[int, "_Line"], told: Mapping[int, dict[str, Any]]
) -> Iterator[UserError]:
    """Yields who does not see a file, or is gone."""
    for line in lines.values():
        line.send({"look for": str(Path(marker).absolute())})
    for index, line in sorted(lines.items()):
        answer = line.receive()
        if answer is None:
            yield PassingError(f"{_name(index, told[index])} is gone before the run began")
        elif answer != {"seen": True}:
            yield UserError(
                f"{_name(index, told[index])} does not see {Path(marker).parent}, as process 0 "
                "does; a workdir that all hosts share is wanted"
            )


def _attend(place: Place, facts: Mapping[str, Any], timeout_s: float, deadline: float) -> Meeting:
    """`meet`, for all processes but process 0."""
    line = None
    while line is None:
        try:
            line = _Line(_connect(place))
        except OSError as error:
            if time.monotonic() > deadline:
                raise PassingError(
                    f"process 0 does not answer at {place.host}:{place.port} after {timeout_s:g} "
                    f"s ({error})"
                ) from error
            time.sleep(_RETRY_S)
    line.send({"index": place.index, "facts": facts})
    message = line.receive()
    if message and "look for" in message:
        line.send({"seen": Path(message["look for"]).exists()})
        message = line.receive()
    if message is None or message["problems"]:
        line.close()
        gone = f"process 0 at {place.host}:{place.port} is gone before the run began"
        _refuse(message["problems"] if message else [gone], not message or message.get("again"))
    return Meeting(place, dict(message["names"]), {0: line})


def _connect(place: Place) -> socket.socket:
    connection = socket.create_connection((place.host, place.port), timeout=_RETRY_S * 10)
    if connection.getsockname() == connection.getpeername():
        # The kernel gave it the very port that it asks for, since nobody listens there yet.
        connection.close()
        raise ConnectionRefusedError("nobody listens there")
    return connection


def _refuse(problems: list[str], again: bool | None) -> NoReturn:
    """Raises problems, as one that another try may mend or as another."""
    kind = PassingError if again else UserError
    raise kind("\n".join(f"processes: {problem}" for problem in problems))


def _name(index: int, facts: Mapping[str, Any]) -> str:
    return f"process {index} ({facts['name']})"


class _Line:
    """A connection that speaks in lines of JSON."""

    def __init__(self, connected: socket.socket):
        self.socket = connected
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):  # Linux has them all
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._file = connected.makefile("rb", buffering=0)  # nothing read ahead of `select`

    def send(self, message: dict[str, Any]) -> None:
        """Sends, or does nothing where nobody listens any more: who reads notices that."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message; None if there will be none, or none came in time."""
        self.socket.settimeout(timeout_s)
        try:
            line = self._file.readline()
            return dict(json.loads(line)) if line.endswith(b"\n") else None
        except (OSError, ValueError, TypeError):
            return None
        finally:
            self.socket.settimeout(None)

    def close(self) -> None:
        """Hangs up."""
        self._file.close()
        self.socket.close()
