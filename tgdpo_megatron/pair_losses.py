"""Apply the loss that the settings name: collect what its formula reads, call the formula, and sum over pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tgdpo_megatron.config import Config, LossConfig
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.losses import Pairs
from tgdpo_megatron.losses.declaration import Formula
from tgdpo_megatron.losses.rewards import token_rewards
from tgdpo_megatron.losses.sft import sft_loss
from tgdpo_megatron.report.metrics import Sums, micro_batch_sums


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a run, as Megatron's schedule calls it on the last pipeline stage."""

    config: Config

    def __call__(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Sums]:
        """The loss summed over pairs, the number of pairs, and sums to report.

        Megatron divides the loss once, by the number of pairs of all ranks.

        Args:
            logps: Token log-probs, nats: those of the policy, those of the frozen models that run beside it, and then
                the divergence if the formula reads it. [k, R] fp32. The policy's and the divergence carry gradient.
        """
        loss = self.config.loss
        policy, inputs = self._read(logps, batch)
        losses, margins = formula(loss)(policy, batch.pairs, **inputs)
        sums = micro_batch_sums(
            loss, batch.pairs, policy.detach(), inputs, losses.detach(), margins.detach(), padding=batch.padding
        )
        # Context-parallel ranks compute the same losses, and Megatron adds up the pairs of all ranks.
        counted = batch.pairs.num_pairs if batch.counts_pairs else 0
        pairs = torch.full((), counted, dtype=torch.int, device=logps.device)
        return losses.sum(), pairs, sums

    def of_each_pair(self, logps: Tensor, batch: Batch) -> Tensor:
        """The loss of each pair of a micro-batch. [P] fp32.

        Args:
            logps: As above.
        """
        policy, inputs = self._read(logps, batch)
        return formula(self.config.loss)(policy, batch.pairs, **inputs)[0]

    def _read(self, logps: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's token log-probs, and what else the formula reads."""
        loss = self.config.loss
        policy, *live = logps
        names = (*self.config.live_models, *(name for name in loss.method.reads if name == "divergence"))
        return policy, inputs_of(loss, batch.pairs, **(batch.scores | dict(zip(names, live, strict=True))))


def formula(loss: LossConfig) -> Formula:
    """The configured formula with its options filled in.

    Returns:
        A function of the policy's token log-probs, the pairs, and the inputs that `loss.method.reads` names. It returns
        the loss and the margin of each pair.
    """
    method: Formula = partial(loss.method.formula, **loss.options)
    return method if not loss.sft_loss_weight else partial(_with_sft, method, loss.sft_loss_weight)


def _with_sft(method: Formula, weight: float, policy: Tensor, pairs: Pairs, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A loss with a multiple of the chosen response's negative mean log-prob added to it."""
    losses, margins = method(policy, pairs, **inputs)
    return losses + weight * sft_loss(policy, pairs)[0], margins


def inputs_of(loss: LossConfig, pairs: Pairs, **scores: Tensor) -> dict[str, Tensor]:
    """What the formula reads beside policy and pairs, made from per-token scores: log-probs, r̂, the divergence.

    Raises:
        ValueError: A score that the loss needs is missing.
    """
    read = [name for name in loss.method.reads if name != "rewards"]
    for name in (*read, *loss.scores):
        if name not in scores:
            raise ValueError(f"loss.type={loss.type} needs {name}, one number per token")
    inputs = {name: scores[name] for name in read}
    if loss.reward_source is not None:
        inputs["rewards"] = token_rewards(loss.reward_source, pairs, scores, **loss.reward_options)
    return inputs


@dataclass(frozen=True)
class Start:
    """What is known of a loss while the policy is the reference.

    Attributes:
        value: The loss of every pair, as ln 2 for DPO.
        slope: How much the loss of a pair changes at most when the log-prob of one of its tokens changes by 1 nat.
    """

    value: float
    slope: float


def start_of(loss: LossConfig) -> Start | None:
    """The loss of every pair while the policy is the reference; None where every pair has a value of its own.

    It is found by computing the loss of two made-up pairs with responses of three tokens.
    """
    if "reference" not in loss.method.reads:
        return None
    tokens = torch.arange(12)
    pairs = Pairs(pair=tokens // 6, side=tokens // 3 % 2, num_pairs=2)
    logps = -torch.linspace(0.1, 3.0, len(tokens), dtype=torch.float64)
    scores = {name: logps * torch.cos(tokens * number) for number, name in enumerate(loss.scores, start=1)}
    scores |= {"reference": logps, "divergence": torch.zeros_like(logps)}
    policy = logps.clone().requires_grad_()
    losses, _ = pair_losses(loss, policy, pairs, **scores)
    (slopes,) = torch.autograd.grad(losses.sum(), policy)
    (first, second), slope = losses.tolist(), float(slopes.abs().max())
    known = math.isclose(first, second, abs_tol=1e-9) and math.isfinite(slope)
    return Start(first, slope) if known else None


def pair_losses(loss: LossConfig, policy: Tensor, pairs: Pairs, **scores: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and margin of each pair under the configured loss.

    Args:
        loss: Which loss, and its options.
        policy: Token log-probs, nats. [R] float; carries gradient.
        pairs: Pair and side of each of the R tokens.
        scores: What the loss and its token rewards need: log-probs `reference`, `guidance`, `better`, `worse`, nats,
            and `reward`. Each [R], constant. Also `divergence` from the reference, nats, [R], which carries gradient.

    Returns:
        Losses and margins. Both [P], in the dtype of `policy`, unreduced.

    Raises:
        ValueError: A score that the loss needs is missing, or shapes differ.
    """
    for name, values in scores.items():
        if values.shape != policy.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, but policy has {tuple(policy.shape)}")
    return formula(loss)(policy, pairs, **inputs_of(loss, pairs, **scores))
