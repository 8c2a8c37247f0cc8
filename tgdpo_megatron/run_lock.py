"""The lock of a folder that a job writes into: a second job is refused for as long as any rank of the first one lives.

The kernel releases a lock when the last process that holds it ends, however it ends. The first rank asks for the lock
alone, so that it finds any other holder, and then shares it with the other ranks of its job. These look for the first
rank's mark in the file, and so notice a folder that their machine does not share with the first one's.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tgdpo_megatron.platform.processes import Ranks

from tgdpo_megatron.errors import UserError

LOCK = "lock"
"""File in the folder, which stays. It says who took the lock last."""
_SECONDS_TO_BE_FREE = 5.0
_SECONDS_TO_BE_SEEN = 10.0
"""A network file system may show a new file late to other machines."""


class InUseError(UserError):
    """Another job works in the folder, which is its own."""


class RunLock:
    """The lock of a folder, held by this process from `take` or `share` to `release`.

    Attributes:
        mark: What `take` writes into the file, and no other lock does.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.mark = uuid.uuid4().hex
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Hold the lock, if no other job does. Called on the first rank. The folder must be there.

        Raises:
            InUseError: Another job holds it.
        """
        if self._file is not None:
            return
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            if not (self._take_and_share() or self._take_and_share()):
                raise BlockingIOError
        except BlockingIOError:
            self._file.seek(0)
            text = self._file.read()
            self.release()
            holder = "" if self.mark in text else _words(text)
            raise InUseError(
                f"{self.path.parent}: another job works there{holder}; wait for its end, or choose another folder."
            ) from None

    def _take_and_share(self) -> bool:
        """Hold the lock alone, leave word of it, and let others share it. False: another job came between.

        Raises:
            BlockingIOError: Another job holds it.
        """
        assert self._file is not None
        self._wait()
        self._file.truncate(0)
        since = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time(), "mark": self.mark}
        self._file.write(json.dumps(since))
        self._file.flush()
        os.fsync(self._file.fileno())  # so that other machines see it
        try:
            self._lock(self._file, fcntl.LOCK_SH)
        except BlockingIOError:  # the kernel gives the lock up before it shares it
            return False
        return True

    def share(self, mark: str) -> bool:
        """Hold the lock together with the first rank, which holds it already.

        Args:
            mark: The first rank's.

        Returns:
            Whether its mark is seen here; otherwise this is another folder.
        """
        deadline = time.monotonic() + _SECONDS_TO_BE_SEEN
        while self._file is None:
            # The file is not there, or not yet, or another job holds its lock.
            with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
                file = opened.enter_context(self.path.open("r+", encoding="utf-8", errors="replace"))
                if mark in file.read():
                    self._lock(file, fcntl.LOCK_SH)
                    opened.pop_all()
                    self._file = file
                    break
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def release(self) -> None:
        """Do not hold the lock any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _wait(self) -> None:
        """Hold the lock alone. The ranks of a job that was killed just now may take a moment to end."""
        assert self._file is not None
        deadline = time.monotonic() + _SECONDS_TO_BE_FREE
        while True:
            try:
                return self._lock(self._file, fcntl.LOCK_EX)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _lock(self, file: IO[str], how: int) -> None:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if how == fcntl.LOCK_EX:  # said once
                print(
                    f"warning: {self.path}: this file system has no locks ({error.strerror}), so that nothing keeps a "
                    "second job out of this folder.",
                    flush=True,
                )


@contextlib.contextmanager
def alone(output: Path) -> Iterator[io.FileIO]:
    """A file that one job adds to, open for reading and adding, and locked until the block ends.

    Raises:
        InUseError: Another job writes it.
        UserError: It cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(output, "a+")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}).") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(f"{output}: another job writes it; wait for its end, or give another --output.") from None
        except OSError as error:  # a file system without locks
            print(f"warning: {output}: cannot be locked ({error.strerror}); nothing keeps a second job off it.")
        yield file


@contextlib.contextmanager
def resumable(output: Path, made: str) -> Iterator[None]:
    """Say of a refusal to write such a file that nothing is lost.

    Args:
        made: What the file holds, in a word.

    Raises:
        UserError: The disk is full, or refuses for another reason.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); the {made} so far are kept: mend that, and give the same "
            "command again."
        ) from None


def write_all(file: io.FileIO, content: bytes) -> None:
    """Write all of it, which one call may not."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def take_together(lock: RunLock, ranks: Ranks, take: Callable[[], None]) -> None:
    """Hold a lock on every rank. Collective.

    Args:
        take: Takes it on the first rank.

    Raises:
        InUseError: Another job holds it.
        UserError: What else `take` raises, or some ranks see another folder.
    """
    import torch.distributed as dist  # late: many read this file's names without torch

    from tgdpo_megatron.platform.processes import on_first_rank

    def taken() -> str:
        take()
        return lock.mark

    mark = on_first_rank(ranks, taken)
    seen: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(seen, None if lock.share(mark) else f"rank {ranks.rank} (on {socket.gethostname()})")
    if blind := [rank for rank in seen if rank is not None]:
        lock.release()
        more = f" and {len(blind) - 1} more" if blind[1:] else ""
        raise UserError(
            f"{lock.path.parent}: {blind[0]}{more} does not see there what rank 0 wrote; the folder must be on a file "
            "system that all nodes share."
        )


def _words(text: str) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        holder: dict[str, Any] = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f" (process {holder['process']} on {holder['host']}, since {since})"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return ""
