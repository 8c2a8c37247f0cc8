"""Metrics: each is a sum over a micro-batch, added over the step and all ranks, and divided once.

Names are TRL's. Rewards include β: `rewards/*` are plain DPO rewards for every loss that reads the reference, and β
times the mean log-prob for the others. Metrics of token rewards begin with `token_rewards/`. Metrics of single losses
are declared with the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.losses import LOSSES, Pairs

Sums = dict[str, Tensor]

_DECLARED = {name: metric for loss in LOSSES.values() for name, metric in loss.metrics.items()}
"""The metrics that single losses declare."""


@torch.no_grad()
def micro_batch_sums(
    loss: LossConfig,
    pairs: Pairs,
    policy: Tensor,
    inputs: Mapping[str, Tensor],
    losses: Tensor,
    margins: Tensor,
    *,
    padding: int = 0,
) -> Sums:
    """Sums over one micro-batch of everything that is reported. Scalars, on the device.

    Args:
        inputs: What the formula read beside the policy's token log-probs, each [R].
        padding: Number of tokens that only fill the micro-batch.
    """
    logps = pairs.sums(policy)
    sums = {
        # Filled on the device. The host would have to wait while a tensor made of a Python number is copied there.
        "pairs": losses.new_full((), pairs.num_pairs),
        "tokens": losses.new_full((), len(policy)),
        "padding": losses.new_full((), padding),
        "loss": losses.sum(),
        "not_finite": (~torch.isfinite(losses)).sum().float(),
        "logps/chosen": logps[:, 0].sum(),
    }
    if loss.method.report is not None:
        sums |= loss.method.report(policy, pairs, margins, **inputs, **loss.options)
    if not loss.method.compares:
        return sums
    implicit = implicit_rewards(loss, pairs, policy, inputs)
    rewards = pairs.sums(implicit)
    sums |= {
        "logps/rejected": logps[:, 1].sum(),
        "rewards/chosen": rewards[:, 0].sum(),
        "rewards/rejected": rewards[:, 1].sum(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).sum().float(),
    }
    if "divergence" in inputs:
        sums["divergence/mean"] = inputs["divergence"].detach().sum()
    if "rewards" in inputs:
        sums |= _token_rewards(loss, inputs["rewards"], implicit)
    return sums


def implicit_rewards(loss: LossConfig, pairs: Pairs, policy: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """β (ℓ − ℓ_ref) of each token. Without a reference: the token's share of β times the mean log-prob. [R]."""
    scale = loss.options.get(loss.method.reward_scale, 1.0)
    if "reference" in inputs:
        return scale * (policy - inputs["reference"])
    return scale * pairs.per_length(policy)


def _token_rewards(loss: LossConfig, rewards: Tensor, implicit: Tensor) -> Sums:
    """Sums about r̂: its spread, its share at 0 and at the limit, and its correlation with the policy's reward."""
    limit = min(loss.reward_options.get("reward_clip") or math.inf, _squashed_limit(loss))
    sums = {
        "token_rewards/mean": rewards.sum(),
        "token_rewards/square": rewards.square().sum(),
        "token_rewards/zero_frac": (rewards.abs() < 1e-6).sum().float(),
        "token_rewards/limit_frac": (rewards.abs() >= limit).sum().float(),
    }
    if "reference" not in loss.method.reads:  # a log-prob alone says how likely a token is, not what was learned
        return sums
    return sums | {
        "token_rewards/implicit_mean": implicit.sum(),
        "token_rewards/implicit_square": implicit.square().sum(),
        "token_rewards/product": (rewards * implicit).sum(),
    }


def _squashed_limit(loss: LossConfig) -> float:
    """The value at which σ(x) − ½ is nearly flat, |x| > 4.6. Infinite where r̂ is not squashed."""
    return 0.49 if loss.reward_options.get("reward_squash") else math.inf


def add_up(
    parts: Sequence[Sums],
    *,
    names: Sequence[str],
    counts_here: bool,
    device: torch.device,
    votes: Mapping[str, float],
) -> dict[str, float]:
    """Add micro-batch sums over the step and all ranks. Collective; one synchronisation.

    Args:
        parts: One per micro-batch on the last pipeline stage, else empty.
        names: Names of the sums, in the same order on every rank.
        counts_here: Whether this rank's sums count. Other tensor- and context-parallel ranks hold copies and
            add zero.
        votes: More numbers to add up, one of every rank, under the same names on every rank.
    """
    vector = torch.zeros(len(names) + len(votes), device=device, dtype=torch.float64)
    for place, vote in enumerate(votes.values(), start=len(names)):
        if vote:
            vector[place].fill_(vote)
    if counts_here and parts:
        sums = torch.stack([torch.stack([part[name] for name in names]) for part in parts]).double().sum(dim=0)
        vector[: len(names)] += sums
    dist.all_reduce(vector)
    return dict(zip([*names, *votes], vector.tolist(), strict=True))


def names_for(loss: LossConfig) -> list[str]:
    """The names that micro_batch_sums reports for a loss, in order."""
    empty = torch.zeros(0)
    none = torch.zeros(0, dtype=torch.int64)
    inputs = dict.fromkeys(loss.method.reads, empty)
    return list(micro_batch_sums(loss, Pairs(none, none, 0), empty, inputs, empty, empty))


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide sums by pairs or by tokens, and compute standard deviations and the correlation."""
    pairs, tokens = max(1.0, sums["pairs"]), max(1.0, sums["tokens"])
    skipped = ("pairs", "tokens", "padding", "not_finite")
    metrics = {
        name: value / (tokens if _is_per_token(name) else pairs) for name, value in sums.items() if name not in skipped
    }
    product = metrics.pop("token_rewards/product", None)
    for name in [name for name in metrics if name.endswith("square")]:
        moment = name.removesuffix("square")
        metrics[f"{moment}std"] = _deviation(metrics[f"{moment}mean"], metrics.pop(name))
    if product is not None:
        implicit = metrics.pop("token_rewards/implicit_mean")
        both = metrics["token_rewards/std"] * metrics.pop("token_rewards/implicit_std")
        covariance = product - metrics["token_rewards/mean"] * implicit
        metrics["token_rewards/correlation"] = covariance / both if both > 1e-12 else 0.0
    return metrics


def _is_per_token(name: str) -> bool:
    """Whether a sum is divided by the number of response tokens. The others are divided by the number of pairs."""
    if name in _DECLARED:
        return _DECLARED[name].per_token
    return name.startswith(("token_rewards/", "divergence/"))


def _deviation(mean: float, square: float) -> float:
    return math.sqrt(max(0.0, square - mean**2))


def warnings(loss: LossConfig, metrics: Mapping[str, float]) -> dict[str, str]:
    """Warnings about the token rewards, by the metric that shows the problem. Empty where no problem shows."""
    found = {}
    if metrics.get("token_rewards/zero_frac", 0) > 0.999 and not metrics["token_rewards/std"]:
        reasons = {
            "guidance": "the guidance gives the same log-probs as the reference; check model.guidance",
            "contrastive": "both prompts give the same log-probs; check scores.contrastive_prompts",
        }
        reason = reasons.get(loss.reward_source or "", "check scores.reward_file")
        found["token_rewards/zero_frac"] = f"all token rewards are 0 and have no effect: {reason}."
    if (share := metrics.get("token_rewards/limit_frac", 0)) > 0.5:
        remedy = " or raise loss.reward_clip" if loss.reward_options.get("reward_clip") else ""
        found["token_rewards/limit_frac"] = (
            f"{share:.0%} of the token rewards are at their limit, so that only their signs still differ; lower "
            f"loss.beta_r{remedy}."
        )
    for name, metric in loss.method.metrics.items():
        if metric.warn_above is not None and (share := metrics.get(name, 0)) > metric.warn_above:
            found[name] = f"{share:.0%} {metric.warning}"
    return found
