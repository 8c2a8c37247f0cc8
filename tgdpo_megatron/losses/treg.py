"""T-REG (ACL 2025, arXiv 2412.02685): DPO or SimPO, regularised by token rewards.

L = −log σ(z) + α W Σ_responses (−Σ_t v r̂_t ℓ_t),  v = β for DPO, β/|y| for SimPO.

A token with r̂ > 0 becomes more likely, in the rejected response too. r̂ comes from contrastive prompts unless
configured otherwise, and is constant. W = σ(−z) is the weight that −log σ(z) itself gives a pair; whether the
authors let gradient through it is not known, and the reasons they give for it (the same balance of both terms at any
margin) ask for `detached`. Their ablations: `static` weight; r̂ = 1 on the chosen response and 0 on the rejected one
(`loss.token_rewards=chosen`); r̂ from DPO's reward (`loss.token_rewards=guidance`).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tgdpo_megatron.losses.pairs import Pairs
from tgdpo_megatron.losses.simpo import simpo
from tgdpo_megatron.methods import SequenceWeight


def dpo_reg(
    policy: Tensor,
    pairs: Pairs,
    *,
    reference: Tensor,
    rewards: Tensor,
    beta: float,
    alpha: float,
    sequence_weight: SequenceWeight = "detached",
    static_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """DPO with the regulariser.

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        reference: The same tokens under the frozen reference, nats. [R]; constant.
        rewards: r̂ of each token. [R]; constant.
        beta: Inverse temperature, > 0. alpha: Strength of the regulariser, ≥ 0.
        sequence_weight: W: σ(−z) without or with gradient, or a constant.
        static_weight: That constant; 1 unless given.

    Returns:
        Loss and DPO's margin z of each pair. Both [P], unreduced.
    """
    margin = pairs.difference(beta * (policy - reference))
    regulariser = pairs.sums(-beta * rewards * policy).sum(dim=1)
    return -logsigmoid(margin) + alpha * _weight(margin, sequence_weight, static_weight) * regulariser, margin


def simpo_reg(
    policy: Tensor,
    pairs: Pairs,
    *,
    rewards: Tensor,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
    sequence_weight: SequenceWeight = "detached",
    static_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """SimPO with the regulariser, arguments as above. SimPO's margin, γ included, is inside W."""
    losses, margin = simpo(policy, pairs, beta=beta, gamma_beta_ratio=gamma_beta_ratio)
    regulariser = pairs.sums(-beta * rewards * pairs.per_length(policy)).sum(dim=1)
    return losses + alpha * _weight(margin, sequence_weight, static_weight) * regulariser, margin


def _weight(margin: Tensor, how: SequenceWeight, static: float | None) -> Tensor:
    """W of each pair. [P]"""
    if how == "static":
        return margin.new_full(margin.shape, 1.0 if static is None else static)
    weight = (-margin).sigmoid()
    return weight.detach() if how == "detached" else weight
