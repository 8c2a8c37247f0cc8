"""T-REG (ACL 2025, arXiv 2412.02685): DPO or SimPO, regularised by token rewards.

L = −log σ(z) + α W Σ_responses (−Σ_t v r̂_t ℓ_t),  v = β for DPO, β/|y| for SimPO.

A token with r̂ > 0 becomes more likely, in the rejected response too. r̂ is constant, and comes from contrastive
prompts unless configured otherwise.

W = σ(−z) is the weight that −log σ(z) itself gives a pair. It is not known whether the authors let gradient flow
through W. Their reason for W is that it keeps both terms in the same balance at any margin, which speaks for
`detached`, the default. The settings for their ablations are `loss.sequence_weight=static`, `loss.token_rewards=chosen`
(r̂ = 1 on the chosen response and 0 on the rejected one) and `loss.token_rewards=guidance` (r̂ from DPO's reward).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tgdpo_megatron.losses.declaration import Formula, Loss, Metric, Option
from tgdpo_megatron.losses.dpo import beta
from tgdpo_megatron.losses.pairs import Pairs, log_sigmoid
from tgdpo_megatron.losses.simpo import GAMMA_BETA_RATIO, simpo_loss

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {
    "alpha": Option(0.25, "Strength of the regulariser, unitless.", at_least=0),
    "sequence_weight": Option(
        "detached",
        "Weight W of a pair's regulariser: σ(−z), detached from the gradient or attached to it, or a static number.",
        choices=("detached", "attached", "static"),
    ),
    "static_weight": Option(
        None,
        "The static number, where sequence_weight=static; 1 unless given.",
        above=0,
        only_with=("sequence_weight", "static"),
    ),
}
METRICS = {"treg/regulariser": Metric("What the regulariser adds to the loss.")}


def dpo_reg_loss(
    policy: Tensor,
    pairs: Pairs,
    *,
    reference: Tensor,
    rewards: Tensor,
    beta: float,
    alpha: float,
    sequence_weight: str = "detached",
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
    token_loss = pairs.sums(-beta * rewards * policy).sum(dim=1)
    return -log_sigmoid(margin) + alpha * _weight(margin, sequence_weight, static_weight) * token_loss, margin


def simpo_reg_loss(
    policy: Tensor,
    pairs: Pairs,
    *,
    rewards: Tensor,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
    sequence_weight: str = "detached",
    static_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """SimPO with the regulariser. Arguments as in dpo_reg_loss; W is a function of SimPO's margin, γ included."""
    losses, margin = simpo_loss(policy, pairs, beta=beta, gamma_beta_ratio=gamma_beta_ratio)
    token_loss = pairs.sums(-beta * rewards * pairs.per_length(policy)).sum(dim=1)
    return losses + alpha * _weight(margin, sequence_weight, static_weight) * token_loss, margin


def _weight(margin: Tensor, how: str, static: float | None) -> Tensor:
    """W of each pair. [P]"""
    if how == "static":
        return margin.new_full(margin.shape, 1.0 if static is None else static)
    weight = (-margin).sigmoid()
    return weight.detach() if how == "detached" else weight


def _reported(formula: Formula) -> Callable[..., dict[str, Tensor]]:
    """The report of a loss with the regulariser: what the loss holds beside −log σ(z)."""

    def report(policy: Tensor, pairs: Pairs, margins: Tensor, **inputs: Any) -> dict[str, Tensor]:
        losses, _ = formula(policy, pairs, **inputs)
        return {"treg/regulariser": (losses + log_sigmoid(margins)).sum()}

    return report


DPO_REG = Loss(
    "dpo_reg",
    dpo_reg_loss,
    meaning="T-REG: DPO with a regulariser that rewards single tokens.",
    equation="that of `dpo` − α σ(−z) β (Σ_w r̂ ℓ + Σ_l r̂ ℓ)",
    paper="arXiv 2412.02685",
    options={"beta": beta(0.1), **OPTIONS},
    rewards="contrastive",
    metrics=METRICS,
    report=_reported(dpo_reg_loss),
)
SIMPO_REG = Loss(
    "simpo_reg",
    simpo_reg_loss,
    meaning="T-REG: SimPO with a regulariser that rewards single tokens.",
    equation="that of `simpo` − α σ(−z) β (mean_w r̂ ℓ + mean_l r̂ ℓ)",
    paper="arXiv 2412.02685",
    options={"beta": beta(2.5), "gamma_beta_ratio": GAMMA_BETA_RATIO, **OPTIONS},
    rewards="contrastive",
    metrics=METRICS,
    report=_reported(simpo_reg_loss),
)
