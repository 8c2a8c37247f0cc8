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
from tgdpo_megatron.losses.dpo import dpo
from tgdpo_megatron.losses.pairs import CHOSEN, REJECTED, Pairs
from tgdpo_megatron.losses.sft import sft
from tgdpo_megatron.losses.tgdpo import tgdpo, token_rewards, token_weights

__all__ = [
    "CHOSEN",
    "REJECTED",
    "Pairs",
    "dpo",
    "formula",
    "pair_losses",
    "sft",
    "tgdpo",
    "token_rewards",
    "token_weights",
]


Formula = Callable[..., tuple[Tensor, Tensor]]


def formula(loss: LossConfig) -> Formula:
    """The configured method, its parameters filled in.

    Returns:
        A function of the policy's token log-probs, the pairs, then the frozen log-probs the method needs
        (none for sft; reference for dpo; reference and guidance for tgdpo), to losses and margins per pair.
    """
    if loss.type == "sft":
        return sft
    if loss.type == "dpo":
        return partial(dpo, beta=loss.beta)
    return partial(tgdpo, beta=loss.beta, alpha=loss.alpha, beta_r=loss.token_reward_scale)


def pair_losses(
    loss: LossConfig,
    policy: Tensor,
    pairs: Pairs,
    *,
    reference: Tensor | None = None,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and margin of each pair under the configured method.

    Args:
        loss: Method and parameters.
        policy: Token log-probs, nats. [R] float; carries gradient.
        pairs: Pair and side of each of the R tokens.
        reference: The same tokens under the reference, nats. [R]; constant. For dpo and tgdpo.
        guidance: The same tokens under the guidance model, nats. [R]; constant. For tgdpo.

    Returns:
        Losses and margins. Both [P], in the dtype of `policy`, unreduced.

    Raises:
        ValueError: The method needs log-probs that were not given, or shapes differ.
    """
    needed = {"reference": reference} if loss.needs_reference else {}
    needed |= {"guidance": guidance} if loss.needs_guidance else {}
    for name, logps in needed.items():
        if logps is None:
            raise ValueError(f"loss.type={loss.type} needs {name} log-probs")
        if logps.shape != policy.shape:
            raise ValueError(f"{name} has shape {tuple(logps.shape)}, policy {tuple(policy.shape)}")
    return formula(loss)(policy, pairs, *needed.values())
