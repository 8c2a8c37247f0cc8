"""Launchers of several nodes: they meet or say why not, and agree on one verdict."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform import meeting
from tgdpo_megatron.platform.launcher import judge
from tgdpo_megatron.platform.meeting import Failure, Meeting, Report, Verdict
from tgdpo_megatron.platform.nodes import Nodes


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def come(rank: int, port: int, *, count: int = 2, processes: int = 1, seconds: float = 20) -> Meeting:
    nodes = Nodes(count, rank, "127.0.0.1", port, "test")
    return Meeting(nodes, processes, timeout_minutes=seconds / 60, silence_minutes=1, wait=time.sleep)


def test_a_node_that_does_not_come_is_named(port: int) -> None:
    with pytest.raises(UserError, match=rf"1 of 3 nodes came to 127.0.0.1:{port} within .*; missing: node 1, 2\. Was"):
        come(0, port, count=3, seconds=0.3)


def test_a_first_node_that_cannot_be_reached_is_named_with_its_endpoint(port: int) -> None:
    with pytest.raises(UserError, match=rf"node 1 cannot reach node 0 at 127.0.0.1:{port} \(Connection refused\)"):
        come(1, port, seconds=0.3)


def test_a_name_that_no_machine_has_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    nodes = Nodes(2, 1, "nosuch.invalid", 29400, "test")
    with pytest.raises(UserError, match=r"--rdzv-endpoint nosuch.invalid:29400: there is no machine of this name"):
        Meeting(nodes, 1, timeout_minutes=1, silence_minutes=1, wait=lambda _: pytest.fail("it waited"))


def test_a_port_that_is_taken_is_refused(port: int) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(UserError, match=rf"--rdzv-endpoint 127.0.0.1:{port}: node 0 cannot listen there"):
            come(0, port)


@pytest.mark.parametrize("second", [Report((Failure(1, "b", -signal.SIGKILL),), cut_short=True), Report()])
def test_all_nodes_agree_on_one_verdict(second: Report, port: int) -> None:
    with ThreadPoolExecutor() as pool:
        first, other = pool.map(lambda rank: come(rank, port), (0, 1))
        verdicts = list(pool.map(lambda of: of[0].agree(of[1], judge), [(first, Report()), (other, second)]))
    first.leave()
    other.leave()
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].code == (1 if second.cut_short else 0)
    assert verdicts[0].sentence.startswith("rank 1 (on b) was ended by SIGKILL" if second.cut_short else "")


def test_a_node_that_is_lost_does_not_keep_the_first_waiting(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_SECONDS_FOR_REPORTS", 0.5)
    with ThreadPoolExecutor() as pool:
        first, other = pool.map(lambda rank: come(rank, port), (0, 1))
    verdict = first.agree(Report((Failure(0, "a", 3, "another rank ended"),), cut_short=True), judge)
    first.leave()
    other.leave()
    assert verdict.code == 75  # on another node the job can go on
    assert verdict.sentence.startswith("the launcher of node 1 (") and "was lost" in verdict.sentence


def test_nodes_that_were_started_differently_are_refused(port: int) -> None:
    def refused(rank: int) -> str:
        with pytest.raises(UserError) as error:
            come(rank, port, processes=1 + rank)
        return str(error.value)

    with ThreadPoolExecutor() as pool:
        said = list(pool.map(refused, (0, 1)))
    assert any("nodes 0 and 1 differ: --nnodes 2 --nproc-per-node 1 here" in sentence for sentence in said)


def test_a_job_of_one_node_needs_no_other() -> None:
    alone = Meeting(Nodes(), 2, timeout_minutes=1, silence_minutes=1, wait=time.sleep)
    assert alone.agree(Report(), judge) == Verdict(0) and alone.port > 0
