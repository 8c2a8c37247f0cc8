"""Where the time of a rank goes: from the start on, every moment belongs to exactly one activity.

An activity may interrupt another one, as a frozen model's forward pass interrupts the policy's. Each change of activity
is marked. On a CPU a mark is a time. On a GPU it is a CUDA event in the stream of the computation, so the time between
two marks is the device's own, whatever the host did meanwhile, and neither side waits for the other.

The clock is also the object that Megatron's schedules call as `config.timers`. Within a schedule a rank computes or
waits: for hidden states of another stage, or for other ranks' gradients. Collectives within a layer count as computing.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

READING, POLICY, FROZEN, WAITING = "reading", "policy", "frozen", "waiting"
OPTIMIZER, EVALUATING, SAVING, OTHER = "optimizer", "evaluating", "saving", "other"
ACTIVITIES = {
    POLICY: "the policy",
    FROZEN: "frozen models",
    WAITING: "waiting",
    OPTIMIZER: "the optimizer",
    READING: "reading data",
    EVALUATING: "evaluating",
    SAVING: "saving",
    OTHER: "other work",
}
"""Activity -> what it is called in a sentence."""
_UNDIVIDED = (EVALUATING, SAVING)
"""Activities that keep the time of what runs within them, such as an evaluation's forward passes."""
_MEGATRON = {"forward-backward": WAITING, "forward-compute": POLICY, "backward-compute": POLICY}
"""Megatron's timer -> the activity. Its other timers run within these."""


@dataclass(frozen=True)
class Spent:
    """Where the time of all ranks went.

    Attributes:
        seconds: Of each activity, the mean over the ranks.
        waiting: Seconds of waiting on each rank.
    """

    seconds: dict[str, float]
    waiting: tuple[float, ...]

    @classmethod
    def nothing(cls, ranks: int) -> Spent:
        """Of ranks that have just started."""
        return cls(dict.fromkeys(ACTIVITIES, 0.0), (0.0,) * ranks)

    @classmethod
    def of(cls, sums: dict[str, float], ranks: int) -> Spent:
        """From the sums over all ranks of what `parts` gives, which are taken out."""
        seconds = {activity: sums.pop(f"seconds/{activity}") / ranks for activity in ACTIVITIES}
        waiting = tuple(sums.pop(f"waiting/{rank}") for rank in range(ranks))
        if ranks > 1:
            return cls(seconds, waiting)
        # A single rank waits for nobody: the time is that of Megatron's schedule itself.
        return cls(seconds | {WAITING: 0.0, OTHER: seconds[OTHER] + seconds[WAITING]}, (0.0,))


def parts(seconds: dict[str, float], rank: int, ranks: int) -> dict[str, float]:
    """What one rank adds to sums over all ranks, for Spent.of."""
    waiting = {f"waiting/{other}": seconds[WAITING] if other == rank else 0.0 for other in range(ranks)}
    return {f"seconds/{activity}": spent for activity, spent in seconds.items()} | waiting


class Clock:
    """Seconds of each activity on this rank.

    Args:
        device: Where this rank computes.

    Attributes:
        of_all_ranks: Where the time of all ranks went, as they last told each other; None before.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget everything up to now."""
        self.of_all_ranks: Spent | None = None
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._running = [OTHER]
        self._marks: deque[tuple[Any, str]] = deque()  # a moment, and the activity that began then
        self._mark()

    def seconds(self) -> dict[str, float]:
        """Seconds of each activity since the start, as far as the device has come. Nobody waits."""
        while len(self._marks) > 1 and self._is_past(self._marks[1][0]):
            began, activity = self._marks.popleft()
            self._seconds[activity] += self._between(began, self._marks[0][0])
        return dict(self._seconds)

    def catch_up(self) -> None:
        """Let the device come to this moment. The host waits for it."""
        self._mark()
        if self._on_gpu:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Count the time of the block as an activity's."""
        self._begin(activity)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # an event raises again what the device met, and would hide the first
                self._end()
            raise
        self._end()

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """One of Megatron's timers."""
        return _Timer(self, _MEGATRON.get(name))

    def _begin(self, activity: str) -> None:
        around = self._running[-1]
        self._running.append(around if around in _UNDIVIDED else activity)
        self._mark()

    def _end(self) -> None:
        self._running.pop()
        self._mark()

    def _mark(self) -> None:
        moment: Any = time.perf_counter()
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((moment, self._running[-1]))

    def _is_past(self, moment: Any) -> bool:
        return bool(moment.query()) if self._on_gpu else True

    def _between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began


class _Timer:
    """What Megatron starts and stops. It asks for a barrier before the start, which would cost time and is left out."""

    def __init__(self, clock: Clock, activity: str | None) -> None:
        self._clock, self._activity = clock, activity

    def start(self, barrier: bool = False) -> None:
        if self._activity is not None:
            self._clock._begin(self._activity)

    def stop(self, barrier: bool = False) -> None:
        if self._activity is not None:
            self._clock._end()
