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
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rpo_jax.errors import PassingError, UserError, may_pass

_AGAIN = "the same command, on every host, goes on from the last checkpoint"
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # seconds, seconds, times
_RETRY_S = 0.2
_HELLO_S = 10.0  # for the rest of a message that has begun
_HEAD_START_S = 1.0  # for the others to end before process 0, without which jax aborts them


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

    def abandon(self, why: str, status: int) -> None:
        """Tells the others that this process ends, why and with which status; so do they."""
        self._left.set()
        self._send_end(f"{self.names[self._place.index]} ended: {why}", status)

    def _send_end(self, why: str, status: int) -> None:
        self._send({"ended": why, "status": status})
        if self._place.index == 0:
            time.sleep(_HEAD_START_S)

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
                        why = f"{self.names[key.data]} is gone"
                        message = {"ended": why, "status": PassingError.status}
                    if "ended" in message and not self._left.is_set():
                        self._exit(message["ended"], message["status"])
                    selector.unregister(key.fileobj)
                    del open_lines[key.data]

    def _exit(self, why: str, status: int) -> None:
        """Ends the process from any thread: the main one may wait in a collective for ever."""
        logging.error("error: %s%s", why, "" if status == UserError.status else f"; {_AGAIN}")
        self._send_end(why, status)
        os._exit(status)


def meet(place: Place, facts: Mapping[str, Any], shared: Path, timeout_s: float) -> Meeting:
    """Waits for all processes, and checks that they are the same and see the same folder.

    Args:
        place: of this process.
        facts: JSON values; `name` is what people call the process, all others must be equal in all
            processes.
        shared: a folder that every process has to see; made where it is not there.
        timeout_s: seconds to wait for the others to come, and again for them to see the folder.

    Raises:
        PassingError: some did not come or answer in time, or are gone again; says which.
        UserError: some differ, or do not see the folder, or it cannot be made; says which. Either
            is raised in all processes alike.
    """
    deadline = time.monotonic() + timeout_s
    if place.index:
        return _attend(place, facts, timeout_s, deadline)
    with _listen(place) as server:
        lines: dict[int, _Line] = {}
        told = {0: json.loads(json.dumps(facts))}  # tuples are lists, as for the others
        found = list(_gather(place, server, lines, told, timeout_s, deadline))
        if not found:
            found = list(_compare(told))
        if not found:
            found = list(_look_for(shared.absolute(), lines, told, timeout_s))
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
    with contextlib.closing(_receive_hellos(server, deadline)) as hellos:
        for line, hello in hellos:
            index, facts = hello["index"], hello["facts"]
            if index in told and not _has_hung_up(lines.get(index)):
                names = f"{told[index]['name']} and {facts['name']}"
                problem = f"two say that they are process {index}: {names}"
                line.send({"problems": [problem], "again": False})
                line.close()
                yield UserError(problem)
                return
            if before := lines.get(index):  # it was started again
                before.close()
            lines[index], told[index] = line, facts
            if len(told) == place.count:
                return
    absent = sorted(set(range(place.count)) - told.keys())
    here = ", ".join(_name(index, said) for index, said in sorted(told.items()))
    yield PassingError(
        f"{len(told)} of {place.count} processes are here after {timeout_s:g} s: {here}; "
        f"missing: {', '.join(f'process {index}' for index in absent)}"
    )


def _receive_hellos(
    server: socket.socket, deadline: float
) -> Generator[tuple["_Line", dict[str, Any]], None, None]:
    """Each connection that says who it is, until the deadline; silent ones hold nobody up."""
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    if key.data is None:
                        line = _Line(server.accept()[0])
                        selector.register(line.socket, selectors.EVENT_READ, line)
                        continue
                    selector.unregister(key.fileobj)
                    hello = key.data.receive(_HELLO_S)
                    if hello and {"index", "facts"} <= hello.keys():
                        yield key.data, hello
                    else:
                        key.data.close()  # whoever that was
        finally:
            for key in selector.get_map().values():
                if key.data is not None:
                    key.data.close()


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
    shared: Path, lines: Mapping[int, "_Line"], told: Mapping[int, dict[str, Any]], timeout_s: float
) -> Iterator[UserError]:
    """Makes a file; yields who does not see it, is gone or does not answer."""
    try:
        shared.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".seen-", dir=shared) as marker:
            for line in lines.values():
                line.send({"look for": marker.name})
            deadline = time.monotonic() + timeout_s
            answers = {
                index: line.receive(max(deadline - time.monotonic(), 0.001))
                for index, line in sorted(lines.items())
            }
    except OSError as error:
        kind = PassingError if may_pass(error) else UserError
        yield kind(f"{_name(0, told[0])} cannot write to {shared}: {error.strerror}")
        return
    for index, answer in answers.items():
        name = _name(index, told[index])
        if answer is None and _has_hung_up(lines[index]):
            yield PassingError(f"{name} is gone before the run began")
        elif answer is None:
            yield PassingError(
                f"{name} has not said after {timeout_s:g} s whether it sees {shared}; does its "
                "mount hang?"
            )
        elif answer != {"seen": True}:
            yield UserError(
                f"{name} does not see {shared}, as process 0 does; a workdir that all hosts share "
                "is wanted"
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
    limit_s = timeout_s + _HELLO_S  # process 0, which says what it waits for, gives up first
    message = line.receive(limit_s)
    if message and "look for" in message:
        line.send({"seen": Path(message["look for"]).exists()})
        message = line.receive(limit_s)
    if message is None:
        gone = _has_hung_up(line)
        line.close()
        what = "is gone before the run began" if gone else f"says nothing for {limit_s:g} s"
        _refuse([f"process 0 at {place.host}:{place.port} {what}"], again=True)
    if message["problems"]:
        line.close()
        _refuse(message["problems"], message["again"])
    return Meeting(place, dict(message["names"]), {0: line})


def _connect(place: Place) -> socket.socket:
    connection = socket.create_connection((place.host, place.port), timeout=_RETRY_S * 10)
    if connection.getsockname() == connection.getpeername():
        # The kernel gave it the very port that it asks for, since nobody listens there yet.
        connection.close()
        raise ConnectionRefusedError("nobody listens there")
    return connection


def _refuse(problems: list[str], again: bool) -> NoReturn:
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
