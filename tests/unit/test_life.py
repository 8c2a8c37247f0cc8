"""Signs of life: they go on over a connection that broke, and a rank that cannot show any says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from tests.unit.test_environment import free_port
from tgdpo_megatron.platform import life

PAUSE = 0.1


def listening(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def seen(store: dist.TCPStore) -> bool:
    return bool(store.check(["signs of life/0"]))


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    found = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    return found


@pytest.fixture
def shows(port: int) -> Iterator[threading.Thread]:
    """The thread of the first of two ranks, which is not started yet."""
    ended = threading.Event()
    signs = life._Signs(0, 2, silence=6 * PAUSE)
    thread = threading.Thread(target=signs.show, args=(ended,), daemon=True)
    yield thread
    ended.set()
    thread.join()


def test_signs_go_on_over_another_connection_when_one_breaks(shows: threading.Thread, port: int) -> None:
    store = listening(port)
    shows.start()
    assert within(10, lambda: seen(store))
    del store
    store = listening(port)
    assert within(10, lambda: seen(store))
    shows_still = shows.is_alive()
    assert shows_still


def test_a_rank_that_cannot_show_that_it_lives_says_so(
    shows: threading.Thread, capfd: pytest.CaptureFixture[str]
) -> None:
    shows.start()
    shows.join(10)
    assert not shows.is_alive()
    assert "warning: rank 0 cannot show that it lives (" in capfd.readouterr().err
