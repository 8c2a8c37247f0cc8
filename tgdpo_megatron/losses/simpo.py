"""Simple preference optimisation (SimPO, arXiv 2405.14734): mean log-probs with a target margin, and no reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tgdpo_megatron.losses.declaration import Loss, Option
from tgdpo_megatron.losses.dpo import beta, label_smoothing, smoothed
from tgdpo_megatron.losses.pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor

GAMMA_BETA_RATIO = Option(0.55, "Target margin over beta, nats per token.", at_least=0)


def simpo_loss(
    policy: Tensor, pairs: Pairs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = β/|y_w| Σ_chosen ℓ − β/|y_l| Σ_rejected ℓ − γ.

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        beta: Scale of a mean log-prob, > 0; 2 to 10 in the paper.
        gamma_beta_ratio: γ/β, the target margin in nats per token, ≥ 0.
        label_smoothing: Probability that a label is wrong, as in cDPO.

    Returns:
        Loss and margin z of each pair, with γ subtracted. Both [P], unreduced.
    """
    margin = pairs.difference(beta * pairs.per_length(policy)) - beta * gamma_beta_ratio
    return smoothed(margin, label_smoothing), margin


SIMPO = Loss(
    "simpo",
    simpo_loss,
    meaning="Simple preference optimisation: mean log-probs with a target margin, and no reference.",
    equation="−log σ(z), z = β (mean_w ℓ − mean_l ℓ) − γ",
    paper="arXiv 2405.14734",
    options={"beta": beta(2.5), "gamma_beta_ratio": GAMMA_BETA_RATIO, "label_smoothing": label_smoothing(0.0)},
)
