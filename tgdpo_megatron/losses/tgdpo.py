"""Token-level guided DPO (TGDPO, ICML 2025, arXiv 2506.14574).

DPO in which every response token is weighted by a token-level reward r̂. In the authors' code r̂ is the scaled
log-ratio of an already aligned guidance model to the reference. Here r̂ can come from any source in rewards.py. Notes:

- r̂ is a constant: no gradient flows through the guidance.
- In the rejected response r̂ has the opposite sign: a token that the guidance dislikes (r̂ < 0) weighs *more* there.
- Tokens are summed, without normalising by length. Weights are not clamped, so a weight is negative where
  r̂ < −1/α in the chosen or r̂ > 1/α in the rejected response (reported as `tgdpo/weight_neg_frac`).
- The authors' code scales r̂ by the β of training. This is the default here (`beta_r` unset).
- The formula is that of the authors' code (commit dd88982) and of summaries of the paper, whose text was not at hand.
  So no equation number is cited.
- With α = 0, or with the reference as guidance, the loss is exactly DPO's.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from tgdpo_megatron.losses.declaration import Loss, Metric, Option
from tgdpo_megatron.losses.dpo import beta
from tgdpo_megatron.losses.pairs import CHOSEN, Pairs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHT_BORDERS = (0.0, 0.5, 1.0, 1.5, 2.0, math.inf)
"""Borders of the intervals for which the share of the token weights is reported."""


def tgdpo_loss(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, rewards: Tensor, beta: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = Σ_chosen β f(r̂) (ℓ − ℓ_ref) − Σ_rejected β f(r̂) (ℓ − ℓ_ref).

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        reference: The same tokens under the frozen reference, nats. [R]; constant.
        rewards: r̂ of each token. [R]; constant.
        beta: Inverse temperature, > 0. alpha: Strength of guidance, ≥ 0. Unitless.

    Returns:
        Loss L and guided margin z of each pair. Both [P], unreduced.
    """
    margin = pairs.difference(beta * token_weights(rewards, pairs, alpha=alpha) * (policy - reference))
    return -log_sigmoid(margin), margin


def token_weights(rewards: Tensor, pairs: Pairs, *, alpha: float) -> Tensor:
    """f(r̂) = 1 + α r̂ on chosen tokens, 1 − α r̂ on rejected ones. [R] -> [R]."""
    return 1 + alpha * rewards.where(pairs.side == CHOSEN, -rewards)


def _report(
    policy: Tensor, pairs: Pairs, margins: Tensor, *, reference: Tensor, rewards: Tensor, beta: float, alpha: float
) -> dict[str, Tensor]:
    """The margin, what guidance adds to it, and how the token weights are distributed."""
    weights = token_weights(rewards, pairs, alpha=alpha)
    unguided = pairs.difference(beta * (policy - reference))
    sums = {
        "tgdpo/margins": margins.sum(),
        "tgdpo/margins_guided": (margins - unguided).sum(),
        "tgdpo/weight_mean": weights.sum(),
        "tgdpo/weight_square": weights.square().sum(),
        "tgdpo/weight_neg_frac": (weights <= 0).sum().float(),
    }
    for low, high in itertools.pairwise(_WEIGHT_BORDERS):
        sums[f"tgdpo/weight_share_{low:g}_to_{high:g}"] = ((weights > low) & (weights <= high)).sum().float()
    return sums


TGDPO = Loss(
    "tgdpo",
    tgdpo_loss,
    meaning="DPO in which every response token is weighted by its token reward; α = 0 is DPO bit for bit.",
    equation="−log σ(z), z = β (Σ_w (1 + α r̂) d − Σ_l (1 − α r̂) d)",
    paper="arXiv 2506.14574",
    options={"beta": beta(0.1), "alpha": Option(0.5, "Strength of r̂ in a token's weight, unitless.", at_least=0)},
    rewards="guidance",
    metrics={
        "tgdpo/margins": Metric("The margin z, guidance included."),
        "tgdpo/margins_guided": Metric("What the token rewards add to the margin of DPO."),
        "tgdpo/weight_mean": Metric("Mean of the token weights 1 ± α r̂.", per_token=True),
        "tgdpo/weight_square": Metric("Standard deviation of the token weights.", per_token=True),
        "tgdpo/weight_neg_frac": Metric(
            "Share of the token weights that are ≤ 0.",
            per_token=True,
            warn_above=0.05,
            warning="of the token weights are ≤ 0 and push their tokens the wrong way; lower loss.alpha or "
            "loss.beta_r.",
        ),
        **{
            f"tgdpo/weight_share_{low:g}_to_{high:g}": Metric(
                f"Share of the token weights above {low:g}" + (f" and up to {high:g}." if math.isfinite(high) else "."),
                per_token=True,
            )
            for low, high in itertools.pairwise(_WEIGHT_BORDERS)
        },
    },
    report=_report,
)
