"""The losses: pure torch functions of per-token log-probs. No process group, no Megatron.

In a notebook::

    import torch
    from tgdpo_megatron.config import LossConfig
    from tgdpo_megatron.losses import Pairs, pair_losses

    pairs = Pairs(pair=torch.tensor([0, 0, 0]), side=torch.tensor([0, 0, 1]), num_pairs=1)
    policy = torch.tensor([-0.5, -1.2, -0.9], requires_grad=True)
    losses, margins = pair_losses(
        LossConfig(type="tgdpo", beta=0.1, alpha=0.5), policy, pairs,
        reference=torch.tensor([-0.7, -1.0, -0.8]), guidance=torch.tensor([-0.4, -1.3, -1.0]),
    )
    losses.mean().backward()
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from tgdpo_megatron.config import LossConfig
from tgdpo_megatron.losses.dpo import dpo, dpo_norm, hinge, ipo, ipo_sum, robust
from tgdpo_megatron.losses.pairs import CHOSEN, REJECTED, Pairs
from tgdpo_megatron.losses.rewards import token_rewards
from tgdpo_megatron.losses.sepo import sepo
from tgdpo_megatron.losses.sft import sft
from tgdpo_megatron.losses.simpo import simpo
from tgdpo_megatron.losses.tdpo import tdpo1, tdpo2
from tgdpo_megatron.losses.tgdpo import tgdpo, token_weights
from tgdpo_megatron.losses.treg import dpo_reg, simpo_reg

__all__ = [
    "CHOSEN",
    "FORMULAS",
    "REJECTED",
    "Formula",
    "Pairs",
    "formula",
    "inputs_of",
    "pair_losses",
    "sft",
    "token_rewards",
    "token_weights",
]

Formula = Callable[..., tuple[Tensor, Tensor]]

FORMULAS: dict[str, Formula] = {
    method.__name__: method
    for method in (
        sft, dpo, dpo_norm, robust, hinge, ipo, ipo_sum, simpo, tgdpo, tdpo1, tdpo2, sepo, dpo_reg, simpo_reg
    )
}  # fmt: skip
"""`loss.type` -> its formula."""


def formula(loss: LossConfig) -> Formula:
    """The configured method, its parameters filled in.

    Returns:
        A function of the policy's token log-probs, the pairs and what `loss.method.reads` names, to losses and
        margins per pair.
    """
    method: Formula = partial(FORMULAS[loss.type], **loss.options)
    return method if not loss.sft_loss_weight else partial(_with_sft, method, loss.sft_loss_weight)


def _with_sft(method: Formula, weight: float, policy: Tensor, pairs: Pairs, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A method's loss, and the chosen response's negative mean log-prob beside it."""
    losses, margins = method(policy, pairs, **inputs)
    return losses + weight * sft(policy, pairs)[0], margins


def inputs_of(loss: LossConfig, pairs: Pairs, **scores: Tensor) -> dict[str, Tensor]:
    """What the method reads beside policy and pairs, from per-token scores: log-probs, r̂, the divergence.

    Raises:
        ValueError: A score is missing.
    """
    read = [name for name in loss.method.reads if name != "rewards"]
    for name in (*read, *loss.scores):
        if name not in scores:
            raise ValueError(f"loss.type={loss.type} needs {name}, one number per token")
    inputs = {name: scores[name] for name in read}
    if loss.source is not None:
        inputs["rewards"] = token_rewards(loss.source, pairs, scores, **loss.reward_options)
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
