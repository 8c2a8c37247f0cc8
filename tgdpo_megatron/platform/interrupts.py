"""Signals that ask a training to stop: noticed between steps, so that a run saves its work before it ends."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

LAUNCHED = "TGDPO_LAUNCHED"
"""Set where our launcher started the ranks: the file in which a rank leaves its last words."""
STARTED = "TGDPO_STARTED"
"""Set by our launcher: when it was started, in seconds since 1970."""
_RESERVED_AT_FIRST = 0.05
FINISH = signal.SIGUSR1
"""Asks a rank to finish its step, save and end."""


def asking() -> list[signal.Signals]:
    """The signals that ask a program to end: a person's Ctrl-C, a batch system's, and that of a closed terminal."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # as under nohup
    return [signal.SIGINT, signal.SIGTERM, FINISH, *hung_up]


def _started() -> float:
    """When this program was started, in seconds since 1970."""
    import psutil  # late: errors.py, and what reads it, also run where no package is installed yet

    return float(os.environ.get(STARTED) or psutil.Process().create_time())


class Deadline:
    """The end of the time that a run has.

    Args:
        minutes: Since the program's start. 0: without end.
    """

    def __init__(self, minutes: float) -> None:
        self.end = _started() + 60 * minutes if minutes else math.inf
        self.reserve = minutes * 60 * _RESERVED_AT_FIRST
        self._longest = 0.0
        self._began: float | None = None

    def is_near(self, longest_save: float = 0.0) -> bool:
        """Whether there is no time left for another step after this one. Asked at the beginning of each.

        What a step took is measured from one beginning to the next, with all that comes after it. Time is reserved for
        the longest so far three times: for the step that is about to begin, for the next one, and for what follows the
        end of the run. For the latter, two saves are reserved in any case: one that is written beside the steps may
        have to end before the last one begins. So is a twentieth of all time, since the first save may be longer than
        any step before.

        Args:
            longest_save: Seconds that a save has taken at most, from its beginning until it was current.
        """
        now = time.time()
        if self._began is not None:
            self._longest = max(self._longest, now - self._began)
        self._began = now
        return now + 2 * self._longest + max(self._longest, 2 * longest_save, self.reserve) > self.end


class Interrupts:
    """What this process was asked by signals.

    Attributes:
        received: The signal that asked for an end; None so far.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Remember a signal. The second Ctrl-C ends the program at once."""
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


@contextlib.contextmanager
def noticed() -> Iterator[Interrupts]:
    """While the block runs, signals that would end this process are only remembered.

    A rank of our launcher leaves Ctrl-C to it. The others it listens to as well: some batch systems send their signals
    to every process of a job.
    """
    interrupts = Interrupts()
    before = {number: signal.signal(number, interrupts.receive) for number in asking()}
    if LAUNCHED in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
