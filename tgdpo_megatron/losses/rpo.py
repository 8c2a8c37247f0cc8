"""Reward-aware preference optimisation (RPO: Nemotron-4 340B, arXiv 2406.11704; arXiv 2502.00203): learn the margin.

DPO pushes two responses apart without end. RPO pushes them as far apart as a reward model says that they are: a pair of
nearly equal responses gives nearly nothing. The distance of the two margins is the Kullback-Leibler divergence of the
two Bernoulli distributions that they stand for, as in NeMo-Aligner's and NeMo-RL's `rpo_bwd_kl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tgdpo_megatron.losses.declaration import Loss, Metric
from tgdpo_megatron.losses.dpo import beta
from tgdpo_megatron.losses.pairs import Pairs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


def rpo_loss(policy: Tensor, pairs: Pairs, *, reference: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """L = σ(t) log [σ(t) / σ(z)] + σ(−t) log [σ(−t) / σ(−z)].

    z = Σ_chosen β (ℓ − ℓ_ref) − Σ_rejected β (ℓ − ℓ_ref) is DPO's margin, and t = Σ_chosen r̂ − Σ_rejected r̂ the reward
    model's. It is 0 where z = t, and approaches DPO's loss where t is large.

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        reference: The same tokens under the frozen reference, nats. [R]; constant.
        rewards: r̂, whose sum over a response is the response's reward, scaled by β_r (the paper's η). [R]; constant.
        beta: Inverse temperature, > 0.

    Returns:
        Loss and margin z of each pair. Both [P], unreduced.
    """
    margin = pairs.difference(beta * (policy - reference))
    target = pairs.difference(rewards).to(margin.dtype)
    better = target.sigmoid() * (log_sigmoid(target) - log_sigmoid(margin))
    worse = (-target).sigmoid() * (log_sigmoid(-target) - log_sigmoid(-margin))
    return better + worse, margin


def _report(policy: Tensor, pairs: Pairs, margins: Tensor, *, rewards: Tensor, **_: Any) -> dict[str, Tensor]:
    return {"rpo/target_margin": pairs.difference(rewards).sum()}


RPO = Loss(
    "rpo",
    rpo_loss,
    meaning="Reward-aware preference optimisation: DPO's margin becomes that of a reward model.",
    equation="KL(σ(t) ‖ σ(z)), z as in `dpo`, t = Σ_w r̂ − Σ_l r̂",
    paper="arXiv 2406.11704, 2502.00203",
    options={"beta": beta(0.1)},
    rewards="file",
    metrics={"rpo/target_margin": Metric("What the margin should become: the chosen less the rejected reward.")},
    report=_report,
)
