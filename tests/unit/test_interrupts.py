"""Which signals a training remembers, and which end it at once."""

from __future__ import annotations

import os
import signal

import pytest

from tgdpo_megatron.platform.interrupts import FINISH, LAUNCHED, asking, noticed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, FINISH, signal.SIGHUP])
def test_a_signal_is_remembered_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with noticed() as asked:
        assert asked.received is None
        os.kill(os.getpid(), number)
        assert asked.received == number
    assert signal.getsignal(number) == before


def test_the_second_ctrl_c_ends_the_program_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), noticed():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_batch_system_may_repeat_its_signal() -> None:
    with noticed() as asked:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert asked.received == signal.SIGINT


def test_ranks_leave_ctrl_c_to_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """And listen to what a batch system sends to every process of a job."""
    monkeypatch.setenv(LAUNCHED, "words")
    with noticed() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.received == signal.SIGTERM


def test_a_closed_terminal_does_not_stop_what_was_started_with_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signal.SIGHUP in asking()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in asking()
    finally:
        signal.signal(signal.SIGHUP, before)
