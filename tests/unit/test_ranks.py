"""Ranks that cannot start, and which of several that ended is named."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest
import torch

from tgdpo_megatron.errors import RANK_DIED, UserError
from tgdpo_megatron.platform import processes

ABORTED, ENDED, KILLED = -signal.SIGABRT, -signal.SIGTERM, -signal.SIGKILL


@dataclass(frozen=True)
class Failure:
    """As torch's launcher reports one."""

    exitcode: int

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


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes._device(0) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="rank 1 of this machine has no GPU: 1 is visible"):
        processes._device(1)
