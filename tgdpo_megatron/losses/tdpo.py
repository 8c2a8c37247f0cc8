"""Token-level DPO (TDPO, arXiv 2404.11999): DPO with the policy's divergence from the reference on both responses.

The divergence K_t = KL(π_ref ‖ π) at a token's place is a sum over the whole vocabulary; it carries gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tgdpo_megatron.losses.pairs import Pairs


def tdpo1(policy: Tensor, pairs: Pairs, *, reference: Tensor, divergence: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = β [Σ_chosen (d + K) − Σ_rejected (d + K)],  d = ℓ − ℓ_ref.

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        reference: The same tokens under the frozen reference, nats. [R]; constant.
        divergence: K of each token's place, nats. [R]; carries gradient.
        beta: Inverse temperature, > 0.

    Returns:
        Loss and margin of each pair. Both [P], unreduced.
    """
    margin = beta * pairs.difference(policy - reference + divergence)
    return -logsigmoid(margin), margin


def tdpo2(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, divergence: Tensor, beta: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = β [Σ_chosen d − Σ_rejected d − α (Σ_rejected K − sg Σ_chosen K)].

    The chosen response's divergence is held constant: only the rejected one's is moved. `alpha` ≥ 0.
    """
    chosen, rejected = pairs.sums(divergence).unbind(dim=1)
    margin = beta * (pairs.difference(policy - reference) - alpha * (rejected - chosen.detach()))
    return -logsigmoid(margin), margin
