"""Token-level DPO (TDPO, arXiv 2404.11999): DPO with the policy's divergence from the reference on both responses.

The divergence K_t = KL(π_ref ‖ π) at the position of a token is a sum over the whole vocabulary and carries gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tgdpo_megatron.losses.declaration import Loss, Option
from tgdpo_megatron.losses.dpo import beta
from tgdpo_megatron.losses.pairs import Pairs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


def tdpo1_loss(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, divergence: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = β [Σ_chosen (d + K) − Σ_rejected (d + K)],  d = ℓ − ℓ_ref.

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        reference: The same tokens under the frozen reference, nats. [R]; constant.
        divergence: K at each token's position, nats. [R]; carries gradient.
        beta: Inverse temperature, > 0.

    Returns:
        Loss and margin of each pair. Both [P], unreduced.
    """
    margin = beta * pairs.difference(policy - reference + divergence)
    return -log_sigmoid(margin), margin


def tdpo2_loss(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, divergence: Tensor, beta: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = β [Σ_chosen d − Σ_rejected d − α (Σ_rejected K − sg Σ_chosen K)].

    The divergence of the chosen response is held constant (sg), so only that of the rejected response is trained.
    `alpha` ≥ 0.
    """
    chosen, rejected = pairs.sums(divergence).unbind(dim=1)
    margin = beta * (pairs.difference(policy - reference) - alpha * (rejected - chosen.detach()))
    return -log_sigmoid(margin), margin


TDPO1 = Loss(
    "tdpo1",
    tdpo1_loss,
    meaning="Token-level DPO: the divergence from the reference at every token is part of the margin.",
    equation="−log σ(z), z = β (Σ_w (d + K) − Σ_l (d + K))",
    paper="arXiv 2404.11999",
    options={"beta": beta(0.1)},
)
TDPO2 = Loss(
    "tdpo2",
    tdpo2_loss,
    meaning="TDPO whose divergence has a weight and is held constant on the chosen response.",
    equation="−log σ(z), z = β (Σ_w d − Σ_l d − α (Σ_l K − Σ_w K)), Σ_w K held constant",
    paper="arXiv 2404.11999",
    options={"beta": beta(0.1), "alpha": Option(0.5, "Strength of the divergence, unitless.", at_least=0)},
)
