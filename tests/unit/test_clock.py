"""Where the time of a rank goes: every moment counts once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tgdpo_megatron.platform import clock as clock_file
from tgdpo_megatron.platform.clock import EVALUATING, FROZEN, OTHER, POLICY, READING, WAITING, Clock, Spent, parts

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that a clock reads, in its only place."""
    moment = [100.0]
    monkeypatch.setattr(clock_file.time, "perf_counter", lambda: moment[0])
    yield moment


def taken(clock: Clock) -> dict[str, float]:
    clock.catch_up()
    return {activity: seconds for activity, seconds in clock.seconds().items() if seconds}


def test_an_activity_within_another_interrupts_it(now: list[float]) -> None:
    clock = Clock(CPU)
    now[0] += 1
    with clock.during(POLICY):
        now[0] += 2
        with clock.during(FROZEN):
            now[0] += 4
        now[0] += 8
    now[0] += 16
    assert taken(clock) == {OTHER: 17, POLICY: 10, FROZEN: 4}


def test_an_evaluation_keeps_the_time_of_its_own_forward_passes(now: list[float]) -> None:
    clock = Clock(CPU)
    with clock.during(EVALUATING):
        now[0] += 1
        with clock.during(POLICY), clock.during(FROZEN):
            now[0] += 2
    assert taken(clock) == {EVALUATING: 3}


def test_in_a_schedule_of_megatron_a_rank_waits_while_it_does_not_compute(now: list[float]) -> None:
    """The calls of its pipeline schedule, a barrier included, which nobody else would ever come to here."""
    clock = Clock(CPU)
    clock("forward-backward", log_level=1).start(barrier=True)
    clock("forward-recv", log_level=2).start()
    now[0] += 1
    clock("forward-recv").stop()
    clock("forward-compute", log_level=2).start()
    now[0] += 2
    clock("forward-compute").stop()
    clock("backward-compute", log_level=2).start()
    now[0] += 4
    clock("backward-compute").stop()
    clock("all-grads-sync", log_level=1).start(barrier=True)
    now[0] += 8
    clock("all-grads-sync").stop()
    clock("forward-backward").stop()
    assert taken(clock) == {WAITING: 9, POLICY: 6}


def test_a_block_that_fails_ends_its_activity(now: list[float]) -> None:
    clock = Clock(CPU)
    with pytest.raises(ZeroDivisionError), clock.during(READING):
        now[0] += 1
        raise ZeroDivisionError
    now[0] += 2
    assert taken(clock) == {READING: 1, OTHER: 2}


def test_an_error_of_the_device_is_not_hidden_by_what_its_events_then_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """torch.cuda.Event of a device that has failed once the block is entered."""

        works = True

        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            if not self.works:
                raise RuntimeError("CUDA error: the launch timed out and was terminated")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="an illegal memory access was encountered"), clock.during(POLICY):
        Event.works = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_was_before_a_restart_does_not_count(now: list[float]) -> None:
    clock = Clock(CPU)
    now[0] += 5
    clock.restart()
    now[0] += 1
    assert taken(clock) == {OTHER: 1}


def test_on_a_gpu_time_counts_once_the_device_has_come_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is at the 30th millisecond while the host has given it work for 60, and the host does not wait."""
    device = {"planned": 0.0, "done": 0.0}

    class Event:
        """torch.cuda.Event, with milliseconds of its own."""

        def __init__(self, enable_timing: bool) -> None:
            self.at = float("inf")

        def record(self) -> None:
            self.at = device["planned"]

        def query(self) -> bool:
            return self.at <= device["done"]

        def elapsed_time(self, later: Any) -> float:
            assert later.query(), "torch refuses to say how long it took until both are done"
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    with clock.during(POLICY):
        device["planned"] = 20
        with clock.during(FROZEN):
            device["planned"] = 60
    device["done"] = 30
    assert clock.seconds()[POLICY] == 0.02 and clock.seconds()[FROZEN] == 0
    device["done"] = 60
    assert clock.seconds()[POLICY] == 0.02 and clock.seconds()[FROZEN] == 0.04


def test_sums_over_ranks_give_the_mean_and_who_waited(now: list[float]) -> None:
    ranks = [{READING: 1.0, WAITING: 2.0}, {READING: 5.0, WAITING: 0.5}]
    whole = [parts(dict.fromkeys(clock_file.ACTIVITIES, 0.0) | own, rank, 2) for rank, own in enumerate(ranks)]
    sums = {"loss": 3.0} | {name: sum(part[name] for part in whole) for name in whole[0]}
    spent = Spent.of(sums, 2)
    assert (spent.seconds[READING], spent.seconds[WAITING], spent.waiting) == (3.0, 1.25, (2.0, 0.5))
    assert sums == {"loss": 3.0}


def test_a_single_rank_waits_for_nobody() -> None:
    own = dict.fromkeys(clock_file.ACTIVITIES, 0.0) | {WAITING: 2.0, OTHER: 1.0, POLICY: 4.0}
    spent = Spent.of(parts(own, 0, 1), 1)
    assert (spent.seconds[WAITING], spent.seconds[OTHER], spent.seconds[POLICY], spent.waiting) == (0, 3, 4, (0,))
