"""The next step's batches are made while a step is under way, and nothing else is different."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tgdpo_megatron.data.ahead import Ahead
from tgdpo_megatron.errors import UserError


class Maker:
    """Makes the square of a step's number, and remembers which it made, in which threads.

    Args:
        fails_at: A step that cannot be made.
        waits: A step is made only when it is allowed to.
    """

    def __init__(self, *, fails_at: int | None = None, waits: bool = False) -> None:
        self.made: list[int] = []
        self.threads: list[int] = []
        self.fails_at = fails_at
        self.allowed = threading.Event()
        if not waits:
            self.allowed.set()
        self.done = {step: threading.Event() for step in range(20)}

    def __call__(self, step: int) -> int:
        assert self.allowed.wait(timeout=10)
        self.made.append(step)
        self.threads.append(threading.get_ident())
        if step == self.fails_at:
            raise UserError(f"step {step} cannot be read.")
        self.done[step].set()
        return step * step


def run(make: Maker, first: int, last: int) -> list[int]:
    """What the steps of a run get, which begins each next step in the middle of a step."""
    given = []
    with Ahead(make) as ahead:
        for step in range(first, last):
            given.append(ahead.get(step))
            if step + 1 < last:
                ahead.begin(step + 1)
    return given


def own_threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name.startswith("ahead"))


@pytest.mark.parametrize(("first", "last"), [(0, 6), (3, 6), (5, 6), (6, 6), (0, 1)])
def test_every_step_gets_its_own_whatever_step_the_run_goes_on_from(first: int, last: int) -> None:
    make = Maker()
    assert run(make, first, last) == [step * step for step in range(first, last)]
    assert make.made == list(range(first, last)), "each once"


def test_a_step_that_was_begun_is_made_by_another_thread_while_nobody_asks_for_it() -> None:
    make = Maker()
    with Ahead(make) as ahead:
        for step in range(5):
            ahead.get(step)
            ahead.begin(step + 1)
            assert make.done[step + 1].wait(timeout=10)
    ours, *others = make.threads
    assert ours == threading.get_ident() and len(set(others)) == 1 and ours not in others


def test_a_step_that_is_asked_for_before_it_is_made_is_waited_for() -> None:
    make = Maker(waits=True)
    with Ahead(make) as ahead:
        ahead.begin(3)
        threading.Timer(0.05, make.allowed.set).start()
        assert ahead.get(3) == 9
    assert make.made == [3]


def test_a_step_that_was_not_begun_is_made_at_once() -> None:
    with Ahead(Maker()) as ahead:
        ahead.begin(5)
        assert [ahead.get(step) for step in (9, 2, 3)] == [81, 4, 9]


def test_what_goes_wrong_ahead_is_raised_at_the_step_that_needs_it() -> None:
    make = Maker(fails_at=3)
    with Ahead(make) as ahead:
        ahead.begin(3)
        with pytest.raises(UserError, match="step 3 cannot be read"):
            ahead.get(3)
    assert threading.get_ident() not in make.threads


def test_what_goes_wrong_ahead_of_a_run_that_stops_before_is_nobodys() -> None:
    with Ahead(Maker(fails_at=3)) as ahead:
        assert ahead.get(2) == 4
        ahead.begin(3)


def test_the_thread_ends_with_the_run_however_it_ends() -> None:
    make = Maker()
    with Ahead(make) as ahead:
        ahead.begin(1)
        assert list(own_threads())
    assert not list(own_threads())
    with pytest.raises(ZeroDivisionError), Ahead(make) as ahead:
        ahead.begin(1)
        _ = 1 / 0
    assert not list(own_threads())
