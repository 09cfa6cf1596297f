"""Several processes, one a host, as one run: start-up, turns, a common end.

The only file that looks into `jax._src`: to learn from the environment which process this is
(`jax.distributed.initialize` does the same and keeps it to itself).
"""

import atexit
import contextlib
import dataclasses
import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

import rpo_jax
from rpo_jax.config import Config, to_dict
from rpo_jax.errors import Stopped, UserError, find_status
from rpo_jax.training.meeting import Meeting, Place, meet
from rpo_jax.training.run import find_versions, list_values

OPTIONS = {
    "processes": "processes of the run, one a host, each started with this same command (1)",
    "coordinator": "HOST:PORT of process 0, where the environment does not know it (TPU VMs, GKE "
    "and Slurm do); the next port is used too",
    "process": "index of this process, with --coordinator",
    "timeout_s": "seconds to wait until all processes are there (300)",
}

# An error inside a collective may be the echo of another process's end, which the meeting names.
_ECHO_S = 2.0

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What a command line says about the processes of a run.

    Attributes:
        processes: how many there should be, one a host.
        coordinator: host:port of process 0; empty: the environment knows (TPU VMs, GKE, Slurm). The
            port after it is used as well.
        process: index of this one; None: the environment knows.
        timeout_s: seconds to wait for all processes.
    """

    processes: int
    coordinator: str
    process: int | None
    timeout_s: float


def read_cluster(processes: str, coordinator: str, process: str, timeout_s: str) -> Cluster:
    """What the flags of `OPTIONS` say.

    Raises:
        UserError: one is no number, or below 1, or means nothing without another.
    """
    flags = {"processes": processes, "process": process, "timeout_s": timeout_s}
    for name, text in flags.items():
        if text and not (text.isdecimal() and (int(text) or name == "process")):
            raise UserError(f"--{name}={text}: a whole number is wanted")
    if (coordinator or process) and int(processes or 1) == 1:
        raise UserError("--coordinator and --process: --processes=2 or more is wanted with them")
    return Cluster(
        processes=int(processes or 1),
        coordinator=coordinator,
        process=int(process) if process else None,
        timeout_s=float(timeout_s or 300),
    )


@contextlib.contextmanager
def joined(config: Config, cluster: Cluster) -> Iterator[None]:
    """Makes this process one of a run's: jax then sees the devices of all of them.

    Before jax starts, the processes meet: all must be there, with the same code, config and
    versions, and see the same workdir. While the context is open, the end of one is the end of all,
    with one exit status, and the others say which it was.

    Raises:
        PassingError: some are missing.
        UserError: some differ, or nothing says which process this is.
    """
    if cluster.processes == 1:
        if jax.process_count() > 1:
            raise UserError(
                f"this is one of {jax.process_count()} hosts: --processes={jax.process_count()} is "
                "wanted, on each of them"
            )
        yield
        return
    place = find_place(cluster)
    facts = _describe(config, cluster)
    # The port of the environment, or of the command line, is jax's own.
    beside = dataclasses.replace(place, port=place.port + 1)
    meeting = meet(beside, facts, Path(config.workdir), cluster.timeout_s)
    _log_as(place, meeting)
    jax.distributed.initialize(
        f"{place.host}:{place.port}",
        place.count,
        place.index,
        cluster_detection_method="deactivate",
        initialization_timeout=int(cluster.timeout_s),
    )
    try:
        yield
    except Stopped:
        _part(meeting)
        raise
    except BaseException as error:
        if not isinstance(error, UserError):
            time.sleep(_ECHO_S)
        status = find_status(error)
        meeting.abandon(f"{error}" if isinstance(error, UserError) else f"{error!r}", status)
        # jax would wait at exit for the processes that ended.
        atexit.register(os._exit, status)
        raise
    _part(meeting)


def _part(meeting: Meeting) -> None:
    jax.distributed.shutdown()  # waits for all
    meeting.leave()


def find_place(cluster: Cluster) -> Place:
    """Which process of how many this is, by the command line or the environment.

    Raises:
        UserError: neither says it, or they disagree.
    """
    if cluster.coordinator:
        host, _, port = cluster.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator={cluster.coordinator}: HOST:PORT is wanted")
        if cluster.process is None or not 0 <= cluster.process < cluster.processes:
            raise UserError(
                f"--process={'' if cluster.process is None else cluster.process}: with "
                f"--coordinator, a number from 0 to {cluster.processes - 1} is wanted"
            )
        return Place(host, int(port), cluster.processes, cluster.process)
    if cluster.process is not None:
        raise UserError(f"--process={cluster.process}: --coordinator=HOST:PORT is wanted with it")
    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(cluster.timeout_s)
    )
    if address is None or count is None or index is None:
        raise UserError(
            f"--processes={cluster.processes}: nothing here says which of them this is (TPU VMs, "
            "GKE and Slurm do); --coordinator=HOST:PORT and --process=INDEX are wanted"
        )
    if count != cluster.processes:
        raise UserError(f"--processes={cluster.processes}: the environment speaks of {count}")
    host, _, port = address.rpartition(":")
    return Place(host, int(port), count, index)


def _describe(config: Config, cluster: Cluster) -> dict[str, Any]:
    """What the processes are compared by, and the name of this one."""
    package = Path(rpo_jax.__file__).parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return {
        "name": f"{socket.gethostname()}, pid {os.getpid()}",
        "processes": cluster.processes,
        "code": code.hexdigest()[:16],
        **find_versions(),
        **dict(list_values({"config": to_dict(config)})),
    }


def _log_as(place: Place, meeting: Meeting) -> None:
    """Process 0 speaks for all; what others still have to say begins with who they are."""
    if place.index == 0:
        logging.info("processes: %s", ", ".join(meeting.names.values()))
    else:
        logging.getLogger().setLevel(logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"process {place.index}: %(message)s"))


def in_turn(work: Callable[[], T]) -> T:
    """What `work` returns; process 0 does it first, the others find what it left on the disk."""
    if jax.process_index() == 0:
        result = work()
        wait_for_all()
        return result
    wait_for_all()
    return work()


def wait_for_all() -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("rpo_jax")


def agree(value: bool) -> bool:
    """What process 0 says; disks may show each process another moment."""
    return bool(multihost_utils.broadcast_one_to_all(value)) if jax.process_count() > 1 else value


def all_should_stop(step: int) -> bool:
    """Whether this is the step after which all processes stop, since one was told to (SIGTERM).

    To be asked after each step, in every process; False where there is one process only.
    """
    return multihost_utils.reached_preemption_sync_point(step)
