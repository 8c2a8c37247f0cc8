"""The lock of a folder that a job writes into: a second job is refused for as long as any rank of the first one lives.

The kernel releases a lock when the last process that holds it ends, however it ends. The first rank asks for the lock
alone, so that it finds any other holder, and then shares it with the other ranks of its job.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from tgdpo_megatron.errors import UserError

LOCK = "lock"
"""File in the folder, which stays. It says who took the lock last."""
_SECONDS_TO_END = 5.0


class InUseError(UserError):
    """Another job works in the folder, which is its own."""


class RunLock:
    """The lock of a folder, held by this process from `take` or `share` to `release`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
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
            self._wait()
            self._file.truncate(0)
            self._file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}))
            self._file.flush()
            self._lock(fcntl.LOCK_SH)
        except BlockingIOError:
            self._file.seek(0)
            holder = _words(self._file.read())
            self.release()
            raise InUseError(
                f"{self.path.parent}: another job works there{holder}; wait for its end, or choose another folder."
            ) from None

    def share(self) -> None:
        """Hold the lock together with the first rank, which holds it already. Called on every rank."""
        if self._file is not None:
            return
        with contextlib.suppress(OSError):  # a folder that was refused is gone
            self._file = self.path.open("a+", encoding="utf-8")
            self._lock(fcntl.LOCK_SH)

    def release(self) -> None:
        """Do not hold the lock any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _wait(self) -> None:
        """Hold the lock alone. The ranks of a job that was killed just now may take a moment to end."""
        deadline = time.monotonic() + _SECONDS_TO_END
        while True:
            try:
                return self._lock(fcntl.LOCK_EX)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _lock(self, how: int) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if how == fcntl.LOCK_EX:  # said once
                print(
                    f"warning: {self.path}: this file system has no locks ({error.strerror}), so that nothing keeps a "
                    "second job out of this folder.",
                    flush=True,
                )


def _words(text: str) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        holder: dict[str, Any] = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f" (process {holder['process']} on {holder['host']}, since {since})"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return ""
