"""Metrics: sums over a micro-batch, added over the step and all ranks, divided once.

Names are TRL's; rewards include β. `rewards/*` are plain DPO rewards for every method; what guidance adds is
under `tgdpo/*`.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.losses import CHOSEN, Pairs, token_rewards, token_weights

Sums = dict[str, Tensor]

# Divided by the number of labelled tokens; everything else by the number of pairs.
_PER_TOKEN = ("tgdpo/weight_mean", "tgdpo/weight_square", "tgdpo/weight_neg_frac", "tgdpo/reward_mean")


@torch.no_grad()
def micro_batch_sums(
    loss: LossConfig, pairs: Pairs, policy: Tensor, frozen: Sequence[Tensor], losses: Tensor, margins: Tensor
) -> Sums:
    """Sums of everything reported, over one micro-batch. Scalars, fp32, on the device."""
    logps = pairs.sums(policy)
    sums = {
        "pairs": losses.new_tensor(float(pairs.num_pairs)),
        "tokens": losses.new_tensor(float(len(policy))),
        "loss": losses.sum(),
        "not_finite": (~torch.isfinite(losses)).sum().float(),
        "logps/chosen": logps[:, 0].sum(),
    }
    if not loss.needs_reference:
        return sums
    rewards = pairs.sums(loss.beta * (policy - frozen[0]))
    sums |= {
        "logps/rejected": logps[:, 1].sum(),
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum().float(),
    }
    if loss.needs_guidance:
        reward = token_rewards(frozen[1], frozen[0], beta_r=loss.token_reward_scale)
        weights = token_weights(reward, pairs, alpha=loss.alpha)
        sums |= {
            "tgdpo/margins": margins.sum(),
            "tgdpo/reward_mean": reward.where(pairs.side == CHOSEN, -reward).sum(),
            "tgdpo/weight_mean": weights.sum(),
            "tgdpo/weight_square": weights.square().sum(),
            "tgdpo/weight_neg_frac": (weights <= 0).sum().float(),
        }
    return sums


def add_up(parts: Sequence[Sums], *, names: Sequence[str], counts_here: bool, device: torch.device) -> dict[str, float]:
    """Add micro-batch sums over the step and all ranks. Collective; one synchronisation.

    Args:
        parts: One per micro-batch on the last pipeline stage, else empty.
        names: What is summed, in order: the same on every rank.
        counts_here: False on ranks that hold a copy (other tensor-parallel ranks), which add zero.
    """
    vector = torch.zeros(len(names), device=device, dtype=torch.float64)
    if counts_here and parts:
        vector += torch.stack([torch.stack([part[name] for name in names]) for part in parts]).double().sum(dim=0)
    dist.all_reduce(vector)
    return dict(zip(names, vector.tolist(), strict=True))


def names_for(loss: LossConfig) -> list[str]:
    """The names micro_batch_sums reports for a method, in order."""
    empty = torch.zeros(0)
    none = torch.zeros(0, dtype=torch.int64)
    sums = micro_batch_sums(loss, Pairs(none, none, 0), empty, [empty, empty], empty, empty)
    return list(sums)


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide sums by pairs, or by tokens, and finish what needs both moments."""
    pairs, tokens = max(1.0, sums["pairs"]), max(1.0, sums["tokens"])
    skipped = ("pairs", "tokens", "not_finite")
    metrics = {
        name: value / (tokens if name in _PER_TOKEN else pairs) for name, value in sums.items() if name not in skipped
    }
    if "tgdpo/weight_square" in metrics:
        variance = metrics.pop("tgdpo/weight_square") - metrics["tgdpo/weight_mean"] ** 2
        metrics["tgdpo/weight_std"] = math.sqrt(max(0.0, variance))
    return metrics


class Logger:
    """Writes metrics.jsonl, and TensorBoard where it is installed, on one rank; does nothing on the others.

    Args:
        first: Optimizer steps done before this process; what an interrupted run wrote after them is dropped.
    """

    def __init__(self, output: Path, *, active: bool, first: int = 0) -> None:
        self.active = active
        self.tensorboard: Any = None
        if not active:
            return
        path = output / "metrics.jsonl"
        kept = _lines_until(first, path) if first and path.is_file() else []
        self.lines = path.open("w")
        self.lines.writelines(kept)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(output / "tensorboard"))

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an optimizer step (1-based)."""
        if not self.active:
            return
        self.lines.write(json.dumps({"iteration": iteration, **metrics}, allow_nan=False) + "\n")
        self.lines.flush()
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush and close the files."""
        if self.active:
            self.lines.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def _lines_until(iteration: int, path: Path) -> list[str]:
    """Metric lines up to an iteration; a line cut short by a killed run is left out."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    return kept
