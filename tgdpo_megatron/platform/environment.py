"""A process's place in a job, as environment variables say it, and where the ranks meet."""

from __future__ import annotations

import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tgdpo_megatron.errors import UserError

OPEN_FILES = 128
"""Files that a rank needs to have open at once, with room: a training of 4 ranks has 60."""
_SECONDS_BETWEEN_ATTEMPTS = 0.5
_TAKEN = "EADDRINUSE"


@dataclass(frozen=True)
class Place:
    """This process's place in a job: its number of all ranks, how many there are, its number on this machine."""

    rank: int
    world_size: int
    local_rank: int


def place_in_job() -> Place:
    """This process's place, from the variables that torchrun sets.

    Raises:
        UserError: A variable is missing, is no number, or does not fit another.
    """
    world = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0, below=world)
    local = _number("LOCAL_RANK", 0, below=world) if world > 1 or "LOCAL_RANK" in os.environ else 0
    if world > 1:
        _number("MASTER_PORT", 1, below=1 << 16)
        if not os.environ.get("MASTER_ADDR", "").strip():
            raise UserError(
                f"MASTER_ADDR is not set, where WORLD_SIZE={world} ranks have to meet; start them with torchrun, or "
                "with --nproc-per-node."
            )
    return Place(rank, world, local)


def _number(name: str, least: int, *, below: int | None = None) -> int:
    """A variable that is a whole number.

    Raises:
        UserError: It is missing, no number, or out of range.
    """
    text = os.environ.get(name)
    if text is None:
        raise UserError(
            f"{name} is not set, where RANK={os.environ.get('RANK')} makes this process a rank of a job; start ranks "
            "with torchrun or --nproc-per-node, or unset RANK."
        )
    number = int(text) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text) else None
    if number is None or number < least or (below is not None and number >= below):
        limits = f"of {least} or more" if below is None else f"from {least} to {below - 1}"
        raise UserError(
            f"{name}={text[:40]!r} is not a whole number {limits}; start ranks with torchrun, which sets it."
        )
    return number


def refuse_tasks_without_ranks(nodes: int) -> None:
    """Refuse more tasks of one `srun` than nodes, of which each would start all ranks of its node.

    Raises:
        UserError: There are more, or SLURM_NTASKS is no number.
    """
    if "SLURM_STEP_ID" not in os.environ or "SLURM_NTASKS" not in os.environ:
        return
    if (tasks := _number("SLURM_NTASKS", 1)) > nodes:
        raise UserError(
            f"srun started {tasks} tasks, but this program starts the ranks of a node itself; start it once on each "
            "node (--ntasks-per-node=1), with --nnodes, --node-rank and --rdzv-endpoint."
        )


def check_open_files() -> None:
    """Let this process open as many files as it needs, where the system allows that.

    Raises:
        UserError: The system does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        raise UserError(f"a process may open {hard} files here, and a rank needs {OPEN_FILES}; raise it (ulimit -n).")
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


def meet(place: Place, timeout: timedelta) -> Any:
    """The store in which the ranks of a job leave each other word, once all have come.

    Raises:
        UserError: They do not meet within the time, or cannot; the sentence says why.
    """
    import torch.distributed as dist

    if place.world_size == 1:
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout.total_seconds()
    minutes = f"{timeout.total_seconds() / 60:g} min"
    listens = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not listens:
        _reach_first_rank(host, port, place, deadline, minutes)
    left = max(_SECONDS_BETWEEN_ATTEMPTS, deadline - time.monotonic())
    try:
        store = _within(left, lambda: _store(place, timedelta(seconds=left)))
    except (dist.DistStoreError, dist.DistNetworkError, TimeoutError) as error:
        if listens and _TAKEN in str(error):
            raise UserError(
                f"MASTER_PORT={port}: another program listens there on this machine; choose another port."
            ) from error
        if listens and "listen" in str(error):
            raise UserError(
                f"MASTER_PORT={port}: rank 0 is not allowed to listen there; choose a port above 1023."
            ) from error
        if listens:
            raise UserError(
                f"not all of the {place.world_size} ranks came to {host}:{port} within {minutes}; start all of them, "
                f"each with MASTER_ADDR={host} MASTER_PORT={port} WORLD_SIZE={place.world_size} and a RANK of its own."
            ) from error
        raise UserError(
            f"rank {place.rank}: what listens at {host}:{port} did not answer as rank 0 of this job within {minutes}; "
            "check MASTER_ADDR and MASTER_PORT."
        ) from error
    store.set_timeout(timeout)
    return store


def _store(place: Place, timeout: timedelta) -> Any:
    import torch.distributed as dist

    return next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))[0]


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What some work returns. torch waits for ever for what listens and says nothing.

    Raises:
        TimeoutError: The work takes longer. It is left behind.
    """
    done = Future[Any]()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    return done.result(timeout=seconds + _SECONDS_BETWEEN_ATTEMPTS)


def _reach_first_rank(host: str, port: int, place: Place, deadline: float, minutes: str) -> None:
    """Wait until something listens where the ranks meet. torch would take minutes more than it is given.

    Raises:
        UserError: Nothing does, or there is no such machine.
    """
    try:
        reach(host, port, deadline, time.sleep)
    except UnknownNameError:
        raise UserError(
            f"MASTER_ADDR={host}: there is no machine of this name; give the address of the first rank's."
        ) from None
    except OSError as error:
        raise UserError(
            f"rank {place.rank} of {place.world_size} did not reach rank 0 at {host}:{port} within {minutes} "
            f"({error.strerror or error}); check MASTER_ADDR and MASTER_PORT, that rank 0 was started, and that no "
            "firewall is between."
        ) from None


class UnknownNameError(OSError):
    """No machine has this name."""


def reach(host: str, port: int, deadline: float, wait: Callable[[float], None]) -> None:
    """Wait until something listens at a port.

    Args:
        deadline: When to give up, on the monotonic clock.
        wait: Lets some seconds pass. May raise what ends this program.

    Raises:
        UnknownNameError: At once.
        OSError: Why the last attempt before the deadline failed.
    """
    while True:
        left = deadline - time.monotonic()
        try:
            # Short attempts, between which `wait` is asked.
            socket.create_connection((host, port), timeout=min(5.0, max(left, _SECONDS_BETWEEN_ATTEMPTS))).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
                raise UnknownNameError(*error.args) from None
            if time.monotonic() + _SECONDS_BETWEEN_ATTEMPTS > deadline:
                raise
        wait(_SECONDS_BETWEEN_ATTEMPTS)
