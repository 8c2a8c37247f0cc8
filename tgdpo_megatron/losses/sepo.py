"""Selective preference optimisation (SePO, arXiv 2408.13518): only tokens selected by token rewards count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tgdpo_megatron.losses.declaration import Loss, Option
from tgdpo_megatron.losses.pairs import CHOSEN, Pairs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


def sepo_loss(
    policy: Tensor, pairs: Pairs, *, rewards: Tensor, gamma: float, selected_share: float
) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = γ mean_selected(ℓ, chosen) − γ mean_selected(ℓ, rejected).

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        rewards: r̂; in the paper the log-ratio of an oracle to its own start. [R]; constant.
        gamma: Scale, > 0. The authors' code has no scale, which is 1; reviews of the paper name 2.1 to 2.5.
        selected_share: Share k of a response's T tokens that is selected: ⌊k T⌋ tokens, at least 1. In the chosen
            response these are the tokens of highest r̂, in the rejected response those of lowest r̂. Ties go to the
            earlier token. Where all r̂ of a response are equal, all its tokens are selected. ⌊k T⌋ is computed in
            floating point, as by the authors' int().

    Returns:
        Loss and margin of each pair. Both [P], unreduced.
    """
    lengths = pairs.lengths().flatten().double()
    share = (selected_share * lengths).floor().clamp(min=1)
    wanted = share.where(pairs.spread(rewards) > 0, lengths)[pairs.response]  # of each token's response
    telling = rewards.where(pairs.side == CHOSEN, -rewards)
    selected = pairs.rank(telling) < wanted
    mean = policy.where(selected, 0) / wanted.to(policy.dtype)
    margin = gamma * pairs.difference(mean)
    return -log_sigmoid(margin), margin


SEPO = Loss(
    "sepo",
    sepo_loss,
    meaning="Selective preference optimisation: only the tokens of highest or lowest token reward count.",
    equation="−log σ(z), z = γ (mean_w ℓ − mean_l ℓ) over the tokens of highest (w) and lowest (l) r̂",
    paper="arXiv 2408.13518",
    options={
        "gamma": Option(2.1, "Scale of the mean log-prob of the selected tokens, unitless.", above=0),
        "selected_share": Option(0.3, "Share of a response's tokens that is selected.", above=0, at_most=1),
    },
    rewards="guidance",
    order_alone=True,
    reward_scale="gamma",
)
