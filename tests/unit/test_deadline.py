"""When a run that has only so much time stops."""

from __future__ import annotations

import time

import pytest

from tgdpo_megatron.platform.interrupts import STARTED, Deadline


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> object:
    """A function that sets the clock, in seconds after the program's start."""
    monkeypatch.setenv(STARTED, "1000")
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: 1000.0 + seconds)


def test_a_run_stops_while_there_is_time_for_one_more_step_and_what_follows(at) -> None:  # type: ignore[no-untyped-def]
    deadline = Deadline(minutes=10)
    for begin in (100, 200, 250, 300):  # the longest takes 100 s, perhaps because it saved
        at(begin)
        assert not deadline.is_near()
    at(301)  # this step may end at 401, another at 501, and what follows at 601
    assert deadline.is_near()


def test_a_twentieth_is_reserved_before_the_first_save(at) -> None:  # type: ignore[no-untyped-def]
    deadline = Deadline(minutes=10)
    at(560)
    assert not deadline.is_near()
    at(571)
    assert Deadline(minutes=10).is_near()


def test_two_saves_are_reserved_although_no_step_waited_for_one(at) -> None:  # type: ignore[no-untyped-def]
    """One may be written beside the steps when another begins."""
    deadline = Deadline(minutes=10)
    for begin in range(100, 381, 10):  # 10 s for each of two steps, and twice 100 s for the saves
        at(begin)
        assert not deadline.is_near(longest_save=100)
    at(390)  # the next beginning: this step ends at 400, and two saves at 600
    assert deadline.is_near(longest_save=100)


def test_without_a_limit_there_is_no_end(at) -> None:  # type: ignore[no-untyped-def]
    at(1e9)
    assert not Deadline(minutes=0).is_near()
