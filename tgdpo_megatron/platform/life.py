"""Signs of life: a job ends, and says why, when one of its ranks stands still.

A thread of each rank writes into the job's store, every few seconds, that it lives and where it is, and reads the same
of the next rank. A rank whose signs cease is stopped, or gone with its machine: the rank before it ends the job. A rank
may also live and yet stand still, as in a read that never returns. Then the others wait for it in a collective, where
they stand still as well; the first rank notices that nobody moves, and names those that stand somewhere else.

The traffic is small: three short words in five seconds of each rank, however many there are.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from tgdpo_megatron.errors import RANK_SILENT, in_short, leave_word
from tgdpo_megatron.platform.environment import reach
from tgdpo_megatron.platform.interrupts import LAUNCHED
from tgdpo_megatron.platform.nodes import SECONDS_TO_ANSWER

_MOST_SECONDS_BETWEEN_SIGNS = 5.0
_ATTEMPTS = 3
"""Connections in a row that may fail. Together they take less than the time after which a rank is silent."""
_WAITING = (
    *("torch.distributed", "torch.cuda", "torch.autograd.graph", "tgdpo_megatron.report.metrics"),
    *("megatron.core.pipeline_parallel.p2p_communication", "megatron.core.distributed"),
)
"""Modules whose functions wait for other ranks: in a collective, or for a device that is in one."""


@dataclass(frozen=True)
class _Here:
    """Where this rank is.

    Attributes:
        words: As a sentence names it.
        watched: Whether the code must move on here. Not in work that may be one long call, such as reading a file.
    """

    words: str = "starting"
    watched: bool = False


_here = _Here()
PLACE = ".place"
"""Ends the name of the file beside a rank's last words where it leaves its place: a killed rank cannot say it."""
_BYTES_OF_A_PLACE = 200


def at(words: str, *, watched: bool = False) -> None:
    """Say where this rank is from now on, such as "step 12, forward and backward".

    Args:
        watched: Whether a rank that does not move here is stuck if no other moves either.
    """
    _move_to(_Here(words, watched))


@contextlib.contextmanager
def during(words: str) -> Iterator[None]:
    """Say where this rank is while the block runs, unwatched; afterwards it is where it was before."""
    before = _here
    _move_to(_Here(words))
    try:
        yield
    finally:
        _move_to(before)


def _move_to(place: _Here) -> None:
    global _here
    _here = place
    if (file := _file_of_places()) is not None:
        with contextlib.suppress(OSError):  # a full disk there must not end a healthy run
            os.pwrite(file, place.words.encode()[:_BYTES_OF_A_PLACE].ljust(_BYTES_OF_A_PLACE), 0)


@functools.cache
def _file_of_places() -> int | None:
    """The file for this rank's launcher; None where no launcher of ours started this process."""
    try:
        return os.open(os.environ[LAUNCHED] + PLACE, os.O_WRONLY | os.O_CREAT, 0o600)
    except (KeyError, OSError):
        return None


@dataclass(frozen=True)
class Sign:
    """What a rank shows of itself.

    Attributes:
        count: Grows with each sign.
        still: Seconds that its main thread has been at one place of the code where it should move.
        waits: Whether it waits for other ranks there.
        line: That place, for people.
        ended: Whether it has come to its good end.
    """

    rank: int
    host: str
    count: int
    words: str
    still: float
    waits: bool
    line: str
    ended: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} (on {self.host})"


@contextlib.contextmanager
def shown(rank: int, world_size: int, *, silence_minutes: float) -> Iterator[None]:
    """Show signs of life while the block runs, and watch over those of others.

    Args:
        silence_minutes: How long a rank may stand still.
    """
    if world_size == 1:
        yield
        return
    ended = threading.Event()
    signs = _Signs(rank, world_size, 60 * silence_minutes)
    thread = threading.Thread(target=signs.show, args=(ended,), daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join(SECONDS_TO_ANSWER)


class _Signs:
    """The signs of this rank, and what it knows of the others. Used by one thread, and from there alone."""

    def __init__(self, rank: int, world_size: int, silence: float) -> None:
        self.rank, self.world_size, self.silence = rank, world_size, silence
        self.pause = min(_MOST_SECONDS_BETWEEN_SIGNS, silence / 6)
        self.host = socket.gethostname()
        self.main = threading.main_thread().ident
        self.launcher = os.getppid()
        self.count = self.failures = 0
        self.stack: Any = None
        self.still = 0.0
        self.next_sign, self.next_silent, self.launcher_stopped = b"", 0.0, 0.0

    def show(self, ended: threading.Event) -> None:
        """Runs beside the main thread until it sets `ended`. A connection that breaks is made again."""
        while not ended.is_set():
            try:
                return self._show_in_store(ended)
            except (OSError, RuntimeError, ValueError) as error:
                self._launcher_lives()
                self.failures += 1
                if self.failures == _ATTEMPTS:
                    print(
                        f"warning: rank {self.rank} cannot show that it lives ({in_short(error)}), and watches over no "
                        "other any more.",
                        file=sys.stderr,
                        flush=True,
                    )
                    return None
            ended.wait(self.pause)

    def _show_in_store(self, ended: threading.Event) -> None:
        """Show signs over one connection.

        Seconds are counted by the pauses between looks: a rank that was stopped itself, as with its whole job, must not
        take the time that it missed for the silence of another.
        """
        # A connection of its own: the main thread may wait in its own for long.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        reach(address, port, time.monotonic(), time.sleep)  # where nothing listens, torch would try for long
        answer = timedelta(seconds=SECONDS_TO_ANSWER)
        store = dist.PrefixStore("signs of life", dist.TCPStore(address, port, is_master=False, timeout=answer))
        while not ended.wait(self.pause):
            if not self._launcher_lives():
                continue
            sign = self._sign()
            store.set(f"{self.rank}", json.dumps(vars(sign)))
            self._look_at_next(store)
            self.failures = 0
            if self.rank == 0 and sign.still > self.silence:
                self._look_at_all(store)
        store.set(f"{self.rank}", json.dumps(vars(self._sign()) | {"ended": True}))

    def _sign(self) -> Sign:
        here, frame = _here, sys._current_frames().get(self.main or 0)
        stack = [(part.f_code, part.f_lasti) for part in _parts(frame)] if here.watched else None
        self.still = self.still + self.pause if stack is not None and stack == self.stack else 0.0
        self.stack, self.count = stack, self.count + 1
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}" if frame else ""
        waits = frame is not None and frame.f_globals.get("__name__", "").startswith(_WAITING)
        return Sign(self.rank, self.host, self.count, here.words, self.still, waits, line)

    def _look_at_next(self, store: Any) -> None:
        following = str((self.rank + 1) % self.world_size)
        if not store.check([following]):
            return
        sign = store.get(following)
        self.next_silent = self.next_silent + self.pause if sign == self.next_sign else 0.0
        self.next_sign = sign
        if self.next_silent > self.silence and not (seen := Sign(**json.loads(sign))).ended:
            _end(f"{seen.name} has given no sign of life for {self.next_silent:.0f} s; last seen at: {seen.words}.")

    def _look_at_all(self, store: Any) -> None:
        """End the job if no rank moves, and name the one for which the others wait."""
        keys = [str(rank) for rank in range(self.world_size)]
        if not store.check(keys):
            return
        signs = [Sign(**json.loads(text)) for text in store.multi_get(keys)]
        if any(sign.still < self.silence for sign in signs):
            return
        elsewhere = [sign for sign in signs if not sign.waits] or signs
        first, *others = sorted(elsewhere, key=lambda sign: sign.rank)
        too = f", and {len(others)} more in its place or another" if others else ""
        _end(
            f"no rank has moved for {min(sign.still for sign in signs):.0f} s; the others wait for {first.name}{too}, "
            f"which is at: {first.words} ({first.line})."
        )

    def _launcher_lives(self) -> bool:
        """Whether to go on. A launcher that is stopped cannot end this rank, nor answer where it holds the store."""
        if os.getppid() != self.launcher:
            os._exit(1)
        with contextlib.suppress(psutil.Error):
            stopped = psutil.Process(self.launcher).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            self.launcher_stopped = self.launcher_stopped + self.pause if stopped else 0.0
            if self.launcher_stopped > self.silence:
                sentence = f"the launcher (process {self.launcher} on {self.host}) is stopped; its ranks end."
                if leave_word(sentence) and os.environ.get("LOCAL_RANK") == "0":  # the launcher says it when it goes on
                    print(f"\nerror: {sentence}", file=sys.stderr, flush=True)
                os._exit(RANK_SILENT)
        return not self.launcher_stopped


def _parts(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _end(sentence: str) -> NoReturn:
    """End this rank, and with it the job, for which its launcher speaks."""
    if not leave_word(sentence):
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(RANK_SILENT)
