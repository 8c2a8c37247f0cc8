"""Ranks that cannot start, and which of several that ended is named."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tgdpo_megatron.errors import RANK_DIED, RANK_SILENT, UserError
from tgdpo_megatron.platform import processes

ABORTED, ENDED, KILLED = -signal.SIGABRT, -signal.SIGTERM, -signal.SIGKILL


@dataclass(frozen=True)
class Failure:
    """As torch's launcher reports one."""

    exitcode: int
    error_file_data: dict[str, Any] = field(default_factory=lambda: {"message": "<NONE>"})
    """What the rank left, or torch's word for nothing."""

    def signal_name(self) -> str:
        return signal.Signals(-self.exitcode).name


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([ABORTED, 1, ENDED], "rank 1 failed with exit code 1"),  # NCCL's watchdog aborts rank 0
        ([RANK_DIED, KILLED, ENDED], "rank 1 was ended by SIGKILL"),  # gloo's ranks end by themselves
        ([ENDED, ABORTED], "rank 1 was ended by SIGABRT"),  # a rank that aborts on its own
        ([ENDED, RANK_DIED, ABORTED], "rank 2 was ended by SIGABRT"),
    ],
)
def test_the_cause_is_named_not_its_consequences(codes: list[int], said: str) -> None:
    code, sentence = processes._explain({rank: Failure(code) for rank, code in enumerate(codes)})
    assert code == 1
    assert sentence.startswith(f"{said};")


def left(exitcode: int, message: str) -> Failure:
    """A rank that left a sentence before it ended."""
    return Failure(exitcode, {"message": {"message": message}})


@pytest.mark.parametrize(
    ("failures", "code", "said"),
    [
        ([left(RANK_DIED, "lost"), left(2, "a.jsonl: no such data file.")], 2, "a.jsonl: no such data file."),
        ([left(RANK_DIED, "lost"), left(1, "rank 1 failed with E")], 1, "rank 1 failed with E; its traceback is above"),
        ([Failure(KILLED), left(RANK_DIED, "lost")], 1, "rank 0 was ended by SIGKILL; "),
        ([Failure(KILLED), left(RANK_SILENT, "rank 0 is silent.")], 1, "rank 1 stopped, because rank 0 is silent. All"),
    ],
)
def test_what_the_failed_rank_left_is_said(failures: list[Failure], code: int, said: str) -> None:
    found, sentence = processes._explain(dict(enumerate(failures)))
    assert found == code
    assert sentence.startswith(said)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes._device(0) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="rank 1 of this machine has no GPU: 1 is visible"):
        processes._device(1)
