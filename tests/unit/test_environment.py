"""A process's place in a job: what its environment must say, and how long it waits for the others."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform import environment
from tgdpo_megatron.platform.environment import Place, meet, place_in_job, refuse_tasks_without_ranks

GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def given(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    """An environment of a rank with some variables changed; None unsets one."""
    for name, value in {**GOOD, "SLURM_STEP_ID": None, "TORCHELASTIC_USE_AGENT_STORE": None, **changes}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


def test_a_place_is_read_from_what_torchrun_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    assert place_in_job() == Place(rank=1, world_size=2, local_rank=1)
    alone = dict.fromkeys(("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    given(monkeypatch, RANK="0", WORLD_SIZE="1", **alone)
    assert place_in_job() == Place(rank=0, world_size=1, local_rank=0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *(
            (name, None, f"{name} is not set, where ")
            for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        ),
        *((name, "", " is not ") for name in GOOD),
        *((name, "abc", "='abc' is not a whole number ") for name in GOOD if name != "MASTER_ADDR"),
        *((name, "9" * 5000, " is not a whole number ") for name in GOOD if name != "MASTER_ADDR"),
        *((name, "-1", "='-1' is not a whole number ") for name in GOOD if name != "MASTER_ADDR"),
        ("RANK", "2", "RANK='2' is not a whole number from 0 to 1"),
        ("RANK", "1.0", "RANK='1.0' is not a whole number from 0 to 1"),
        ("RANK", "١", "RANK='١' is not a whole number from 0 to 1"),  # int() reads Arabic digits
        ("RANK", "--5", "RANK='--5' is not a whole number from 0 to 1"),
        ("WORLD_SIZE", "0", "WORLD_SIZE='0' is not a whole number of 1 or more"),
        ("MASTER_PORT", "65536", "MASTER_PORT='65536' is not a whole number from 1 to 65535"),
    ],
)
def test_what_cannot_be_a_place_is_refused_by_name(
    name: str, value: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, **{name: value})
    with pytest.raises(UserError) as refused:
        place_in_job()
    assert words in str(refused.value) and name in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(("tasks", "words"), [("3", "srun started 3 tasks"), ("two", "SLURM_NTASKS='two' is not")])
def test_more_tasks_of_srun_than_nodes_are_refused(tasks: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, SLURM_STEP_ID="0", SLURM_NTASKS=tasks)
    with pytest.raises(UserError, match=words):
        refuse_tasks_without_ranks(nodes=2)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    refuse_tasks_without_ranks(nodes=2)


def test_a_low_limit_of_open_files_is_raised_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (64, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: limits.update(now=to))
    environment.check_open_files()
    assert limits["now"] == (environment.OPEN_FILES, 4096)
    limits["now"] = (20, 20)
    with pytest.raises(UserError, match="a process may open 20 files here, and a rank needs 128"):
        environment.check_open_files()


# ---------------------------------------------------------------- where ranks meet


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A program that listens and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(10)
        yield listening


def refused_after(
    rank: int, monkeypatch: pytest.MonkeyPatch, *, port: int, host: str = "127.0.0.1"
) -> tuple[str, float]:
    """The sentence for a rank of two that meets nobody in two seconds, and how long it took."""
    import torch.distributed  # noqa: F401  # before the clock starts

    given(monkeypatch, MASTER_ADDR=host, MASTER_PORT=str(port))
    started = time.monotonic()
    with pytest.raises(UserError) as refused:
        meet(Place(rank, 2, rank), timedelta(seconds=2))
    return str(refused.value), time.monotonic() - started


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_first_rank_that_nobody_started_is_not_waited_for_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    said, seconds = refused_after(1, monkeypatch, port=free_port())
    assert "rank 1 of 2 did not reach rank 0 at 127.0.0.1:" in said and "(Connection refused)" in said
    assert seconds < 10


def test_what_listens_and_says_nothing_is_not_waited_for_longer_than_asked(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own store would wait for ever."""
    said, seconds = refused_after(1, monkeypatch, port=listener.getsockname()[1])
    assert "did not answer as rank 0 of this job within" in said and seconds < 10


def test_a_rank_that_never_comes_is_not_waited_for_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    said, seconds = refused_after(0, monkeypatch, port=free_port())
    assert said.startswith("not all of the 2 ranks came to 127.0.0.1:") and seconds < 10


def test_a_port_that_is_taken_is_named(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    port = listener.getsockname()[1]
    said, _ = refused_after(0, monkeypatch, port=port)
    assert said == f"MASTER_PORT={port}: another program listens there on this machine; choose another port."


def test_a_name_that_no_machine_has_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    said, seconds = refused_after(1, monkeypatch, port=29500, host="nosuch.invalid")
    assert said.startswith("MASTER_ADDR=nosuch.invalid: there is no machine of this name") and seconds < 1
