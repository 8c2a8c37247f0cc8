"""Signals that ask a training to stop: noticed between steps, so that a run saves its work before it ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from types import FrameType

from tgdpo_megatron.errors import INTERRUPTED, REQUEUE

LAUNCHED = "TGDPO_LAUNCHED"
"""Set where our launcher started the ranks: the file in which a rank leaves its last words."""
FINISH = signal.SIGUSR1
"""Asks a rank to finish its step, save and end."""


def asking() -> list[signal.Signals]:
    """The signals that ask a program to end: a person's Ctrl-C, a batch system's, and that of a closed terminal."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # as under nohup
    return [signal.SIGINT, signal.SIGTERM, FINISH, *hung_up]


def code_of(asked: Collection[int]) -> int:
    """The exit code of a program that was asked to end by these signals, or by its own clock."""
    return INTERRUPTED if signal.SIGINT in asked else REQUEUE


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
