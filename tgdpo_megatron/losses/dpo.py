"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290) and other losses on its margin.

The margin z is the difference of two responses' summed log-ratios to the reference, times β; the methods differ in
what they make of it. Everywhere: `policy` [R] token log-probs, nats, carries gradient; `reference` [R] the same tokens
under the frozen reference, constant; results are loss and margin of each pair, both [P], unreduced.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tgdpo_megatron.losses.pairs import Pairs


def dpo(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """L = −(1 − ε) log σ(z) − ε log σ(−z),  z = Σ_chosen β (ℓ − ℓ_ref) − Σ_rejected β (ℓ − ℓ_ref).

    Sums over tokens, not means: a longer response can move z further. With ε > 0 this is cDPO (Mitchell, 2023).

    Args:
        policy, pairs, reference: See the module.
        beta: Inverse temperature, > 0, unitless.
        label_smoothing: ε, the probability that a label is wrong, in [0, 0.5).
    """
    margin = pairs.difference(beta * (policy - reference))
    return smoothed(margin, label_smoothing), margin


def dpo_norm(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """DPO on log-ratios averaged over each response's tokens; TRL's `sigmoid_norm`."""
    margin = pairs.difference(beta * pairs.per_length(policy - reference))
    return smoothed(margin, label_smoothing), margin


def robust(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """L = [−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε): unbiased where labels flip with that ε (arXiv 2403.00409)."""
    margin = pairs.difference(beta * (policy - reference))
    flipped = -(1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return flipped / (1 - 2 * label_smoothing), margin


def hinge(policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """L = max(0, 1 − z), as in SLiC (arXiv 2305.10425)."""
    margin = pairs.difference(beta * (policy - reference))
    return (1 - margin).relu(), margin


def ipo(policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """L = (z − 1/(2β))²,  z the difference of *mean* log-ratios, without β: IPO (arXiv 2310.12036) as TRL has it."""
    margin = pairs.difference(pairs.per_length(policy - reference))
    return (margin - 1 / (2 * beta)).square(), margin


def ipo_sum(policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """IPO with *summed* log-ratios, as DPO's first repository has it."""
    margin = pairs.difference(policy - reference)
    return (margin - 1 / (2 * beta)).square(), margin


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z). [P] -> [P]."""
    if not label_smoothing:
        return -logsigmoid(margin)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
