"""Ranks that cannot start, and which of several that ended is named."""

from __future__ import annotations

import signal

import pytest
import torch

from tgdpo_megatron.errors import RANK_DIED, RANK_SILENT, REQUEUE, UserError
from tgdpo_megatron.platform import processes
from tgdpo_megatron.platform.launcher import judge
from tgdpo_megatron.platform.meeting import Failure, Report
from tgdpo_megatron.platform.nodes import ALONE, Nodes, nodes_of

ABORTED, KILLED, ASKED = -signal.SIGABRT, -signal.SIGKILL, -signal.SIGUSR1


def ended(*failures: tuple[int, str | None], asked: tuple[int, ...] = ()) -> Report:
    """A node whose ranks ended with these exit codes and last words."""
    named = (Failure(rank, "host", code, words) for rank, (code, words) in enumerate(failures) if code)
    return Report(tuple(named), asked, cut_short=True)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([ABORTED, 1], "rank 1 failed with exit code 1;"),  # NCCL's watchdog aborts rank 0
        ([RANK_DIED, KILLED, RANK_DIED], "rank 1 was ended by SIGKILL;"),  # gloo's ranks end by themselves
        ([0, ABORTED], "rank 1 was ended by SIGABRT;"),  # a rank that aborts on its own
        ([0, RANK_DIED, ABORTED], "rank 2 was ended by SIGABRT;"),
        ([0, RANK_DIED, -40], "rank 2 was ended by signal 40;"),
    ],
)
def test_the_cause_is_named_not_its_consequences(codes: list[int], said: str) -> None:
    verdict = judge([ended(*((code, None) for code in codes))])
    assert verdict.code == 1
    assert verdict.sentence.startswith(said)


@pytest.mark.parametrize(
    ("failures", "code", "said"),
    [
        ([(RANK_DIED, "lost"), (2, "a.jsonl: no such data file.")], 2, "a.jsonl: no such data file."),
        ([(RANK_DIED, "lost"), (1, "rank 1 failed with E")], 1, "rank 1 failed with E; its traceback is above"),
        ([(KILLED, None), (RANK_DIED, "lost")], 1, "rank 0 was ended by SIGKILL; "),
        ([(KILLED, None), (RANK_SILENT, "Rank 0 is silent.")], 1, "Rank 0 is silent. All"),
        ([(REQUEUE, "saved."), (RANK_DIED, "lost")], 75, "saved."),
    ],
)
def test_what_the_failed_rank_left_is_said(failures: list[tuple[int, str]], code: int, said: str) -> None:
    verdict = judge([ended(*failures)])
    assert verdict.code == code
    assert verdict.sentence.startswith(said)


def test_a_rank_that_was_killed_is_named_with_the_place_where_it_was() -> None:
    failure = Failure(1, "host", KILLED, place="step 12, forward and backward")
    sentence = judge([Report((failure,), cut_short=True)]).sentence
    assert "rank 1 was ended by SIGKILL;" in sentence and "last at: step 12, forward and backward." in sentence
    assert "memory" in sentence


def test_the_cause_is_found_on_any_node_and_its_host_named() -> None:
    second = Report((Failure(2, "node-b", KILLED),), cut_short=True)
    verdict = judge([ended((RANK_DIED, "lost"), (ABORTED, None)), second])
    assert verdict.code == 1
    assert verdict.sentence.startswith("rank 2 (on node-b) was ended by SIGKILL;")


@pytest.mark.parametrize(
    ("asked", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_a_job_that_was_asked_to_end_asks_for_a_requeue_unless_a_person_asked(asked: int, code: int) -> None:
    """Before the first step as well, where ranks end by the signal itself."""
    for codes in [(REQUEUE, "saved."), (ASKED, None)], [(ASKED, None)], []:
        assert judge([ended(*codes, asked=(asked,)), Report()]).code == code


def test_a_second_ctrl_c_is_said_to_have_ended_a_step_at_once() -> None:
    verdict = judge([ended((ASKED, None), asked=(signal.SIGINT, signal.SIGINT))])
    assert verdict.sentence.startswith("stopped at once by a second Ctrl-C;") and not verdict.is_failure


def test_a_job_whose_ranks_all_came_to_a_good_end_says_nothing() -> None:
    verdict = judge([Report(), Report(asked=(signal.SIGTERM,))])
    assert (verdict.code, verdict.sentence) == (0, "")


@pytest.mark.parametrize(
    ("count", "rank", "endpoint", "words"),
    [
        (0, None, None, "--nnodes must be at least 1"),
        (2, None, "a:1", "--node-rank is not given"),
        (2, 2, "a:1", "--node-rank is 2; give each node its own number, 0 to 1"),
        (2, -1, "a:1", "--node-rank is -1"),
        (2, 0, None, "--rdzv-endpoint HOST:PORT is needed"),
        *((2, 0, wrong, "expected HOST:PORT") for wrong in ("a", ":1", "a:", "a:0", "a:65536", "a:x", "a:²")),
    ],
)
def test_a_node_without_its_place_is_refused(count: int, rank: int | None, endpoint: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        nodes_of(count, rank, endpoint, "job")


def test_a_node_is_told_its_place() -> None:
    assert nodes_of(1, None, None, None) is ALONE
    assert nodes_of(4, 3, "node-0:29400", "17") == Nodes(4, 3, "node-0", 29400, "17")
    assert nodes_of(2, 1, "[::1]:29400", None).host == "::1"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes._device(0) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="rank 1 of this machine has no GPU: 1 is visible"):
        processes._device(1)
