"""Trainings whose loss draws random numbers, and is not finite for one pair."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tests.support.jobs import train_all
from tgdpo_megatron import pair_losses
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.platform.processes import Ranks


def train_and_continue(ranks: Ranks, *, job: dict[str, Any], whole: str, again: str, kept: str, bad: int) -> None:
    """Train to `whole`. Then go on from its checkpoint `kept`, in a copy of its folder without any later one.

    Args:
        bad: The pair whose loss is not finite.
    """
    read = pair_losses.PreferenceLoss._read

    def odd(self: Any, logps: torch.Tensor, batch: Batch) -> Any:
        policy, inputs = read(self, logps, batch)
        policy = policy * (1 + 0.1 * torch.rand(policy.shape))
        for place, pair in enumerate(batch.samples):
            if pair == bad:
                policy = torch.where(batch.pairs.pair == place, torch.nan, policy)
        return policy, inputs

    pair_losses.PreferenceLoss._read = odd  # type: ignore[method-assign]
    train_all(ranks, recipe="dpo_tiny", jobs=[job | {"train": job["train"] | {"output": whole}}])
    if ranks.is_first:
        shutil.copytree(whole, again)
        for checkpoint in Path(again).glob("checkpoints/iter-*"):
            if checkpoint.name > kept:
                shutil.rmtree(checkpoint)
    torch.distributed.barrier()
    train_all(ranks, recipe="dpo_tiny", jobs=[job | {"train": job["train"] | {"output": again, "resume": True}}])
