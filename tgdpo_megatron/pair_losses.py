"""Apply the loss that the settings name: join what it reads, fill in its options, call its formula, sum over pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tgdpo_megatron.config import Config, LossConfig
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.losses import LOSSES, Pairs
from tgdpo_megatron.losses.declaration import Formula
from tgdpo_megatron.losses.rewards import token_rewards
from tgdpo_megatron.losses.sft import sft_loss
from tgdpo_megatron.report.metrics import Sums, micro_batch_sums


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a run, as Megatron's schedule calls it on the last pipeline stage."""

    config: Config

    def __call__(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Sums]:
        """Sum over pairs, number of pairs, sums to report: Megatron divides once, by the pairs of all ranks.

        Args:
            logps: Token log-probs, nats: the policy's, then those of carried models, then the divergence if the
                formula reads it. [k, R] fp32; the policy's and the divergence carry gradient.
        """
        loss = self.config.loss
        policy, *live = logps
        carried = loss.carried if self.config.scores.source == "live" else ()
        names = (*carried, *(name for name in loss.method.reads if name == "divergence"))
        inputs = inputs_of(loss, batch.pairs, **(batch.scores | dict(zip(names, live, strict=True))))
        losses, margins = formula(loss)(policy, batch.pairs, **inputs)
        sums = micro_batch_sums(
            loss, batch.pairs, policy.detach(), inputs, losses.detach(), margins.detach(), padding=batch.padding
        )
        pairs = torch.full((), batch.pairs.num_pairs, dtype=torch.int, device=logps.device)
        return losses.sum(), pairs, sums


def formula(loss: LossConfig) -> Formula:
    """The configured formula, its options filled in.

    Returns:
        A function of the policy's token log-probs, the pairs and what `loss.method.reads` names, to losses and
        margins per pair.
    """
    method: Formula = partial(LOSSES[loss.type].formula, **loss.options)
    return method if not loss.sft_loss_weight else partial(_with_sft, method, loss.sft_loss_weight)


def _with_sft(method: Formula, weight: float, policy: Tensor, pairs: Pairs, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A loss, and the chosen response's negative mean log-prob beside it."""
    losses, margins = method(policy, pairs, **inputs)
    return losses + weight * sft_loss(policy, pairs)[0], margins


def inputs_of(loss: LossConfig, pairs: Pairs, **scores: Tensor) -> dict[str, Tensor]:
    """What the formula reads beside policy and pairs, from per-token scores: log-probs, r̂, the divergence.

    Raises:
        ValueError: A score is missing.
    """
    read = [name for name in loss.method.reads if name != "rewards"]
    for name in (*read, *loss.scores):
        if name not in scores:
            raise ValueError(f"loss.type={loss.type} needs {name}, one number per token")
    inputs = {name: scores[name] for name in read}
    if loss.reward_source is not None:
        inputs["rewards"] = token_rewards(loss.reward_source, pairs, scores, **loss.reward_options)
    return inputs


def pair_losses(loss: LossConfig, policy: Tensor, pairs: Pairs, **scores: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and margin of each pair under the configured method.

    Args:
        loss: Method and parameters.
        policy: Token log-probs, nats. [R] float; carries gradient.
        pairs: Pair and side of each of the R tokens.
        scores: What the method and its token rewards need: `reference`, `guidance`, `better`, `worse` log-probs,
            nats; `reward`; each [R], constant. `divergence` from the reference, nats, [R]; carries gradient.

    Returns:
        Losses and margins. Both [P], in the dtype of `policy`, unreduced.

    Raises:
        ValueError: The method needs scores that were not given, or shapes differ.
    """
    for name, values in scores.items():
        if values.shape != policy.shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, policy {tuple(policy.shape)}")
    return formula(loss)(policy, pairs, **inputs_of(loss, pairs, **scores))
