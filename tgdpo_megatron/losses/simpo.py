"""Simple preference optimisation (SimPO, arXiv 2405.14734): mean log-probs, no reference, a margin asked for."""

from __future__ import annotations

from torch import Tensor

from tgdpo_megatron.losses.dpo import smoothed
from tgdpo_megatron.losses.pairs import Pairs


def simpo(
    policy: Tensor, pairs: Pairs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = β/|y_w| Σ_chosen ℓ − β/|y_l| Σ_rejected ℓ − γ.

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        beta: Scale of a mean log-prob, > 0; 2 to 10 in the paper.
        gamma_beta_ratio: γ/β, the margin asked for in nats per token, ≥ 0.
        label_smoothing: Probability that a label is wrong, as in cDPO.

    Returns:
        Loss and margin z, γ taken off, of each pair. Both [P], unreduced.
    """
    margin = pairs.difference(beta * pairs.per_length(policy)) - beta * gamma_beta_ratio
    return smoothed(margin, label_smoothing), margin
