"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290) and other losses on its margin.

The margin z is the difference of two responses' summed log-ratios to the reference, times β. The losses differ in what
they make of the margin. In all of them `policy` is the policy's token log-probs, nats, [R], and carries gradient.
`reference` is the log-probs of the same tokens under the frozen reference, [R], constant. The results are the loss and
the margin of each pair, both [P], unreduced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tgdpo_megatron.losses.declaration import Loss, Option
from tgdpo_megatron.losses.pairs import Pairs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


def beta(default: float) -> Option:
    """The option `beta` of losses on log-ratios or log-probs."""
    return Option(default, "Inverse temperature, unitless.", above=0)


def label_smoothing(default: float) -> Option:
    """The option `label_smoothing`."""
    return Option(default, "Probability that a pair's label is wrong.", at_least=0, below=0.5)


def dpo_loss(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """L = −(1 − ε) log σ(z) − ε log σ(−z),  z = Σ_chosen β (ℓ − ℓ_ref) − Σ_rejected β (ℓ − ℓ_ref).

    Sums over tokens, not means: a longer response can move z further. With ε > 0 this is cDPO (Mitchell, 2023).

    Args:
        policy, pairs, reference: As described at the top of this file.
        beta: Inverse temperature, > 0, unitless.
        label_smoothing: ε, the probability that a label is wrong, in [0, 0.5).
    """
    margin = pairs.difference(beta * (policy - reference))
    return smoothed(margin, label_smoothing), margin


def dpo_norm_loss(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """DPO on log-ratios averaged over each response's tokens; TRL's `sigmoid_norm`."""
    margin = pairs.difference(beta * pairs.per_length(policy - reference))
    return smoothed(margin, label_smoothing), margin


def robust_loss(
    policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """L = [−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε): unbiased if a share ε of labels is wrong, arXiv 2403.00409."""
    margin = pairs.difference(beta * (policy - reference))
    flipped = -(1 - label_smoothing) * log_sigmoid(margin) + label_smoothing * log_sigmoid(-margin)
    return flipped / (1 - 2 * label_smoothing), margin


def hinge_loss(policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """L = max(0, 1 − z), as in SLiC (arXiv 2305.10425)."""
    margin = pairs.difference(beta * (policy - reference))
    return (1 - margin).relu(), margin


def ipo_loss(policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """L = (z − 1/(2β))²,  z the difference of *mean* log-ratios, without β: IPO (arXiv 2310.12036) as in TRL."""
    margin = pairs.difference(pairs.per_length(policy - reference))
    return (margin - 1 / (2 * beta)).square(), margin


def ipo_sum_loss(policy: Tensor, pairs: Pairs, *, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """IPO with *summed* log-ratios, as in the code of DPO's authors."""
    margin = pairs.difference(policy - reference)
    return (margin - 1 / (2 * beta)).square(), margin


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z). [P] -> [P]."""
    if not label_smoothing:
        return -log_sigmoid(margin)
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


DPO = Loss(
    "dpo",
    dpo_loss,
    meaning="Direct preference optimisation; with label smoothing it is cDPO.",
    equation="−log σ(z), z = β (Σ_w d − Σ_l d)",
    paper="arXiv 2305.18290",
    options={"beta": beta(0.1), "label_smoothing": label_smoothing(0.0)},
)
DPO_NORM = Loss(
    "dpo_norm",
    dpo_norm_loss,
    meaning="DPO on log-ratios averaged over each response's tokens.",
    equation="−log σ(z), z = β (mean_w d − mean_l d)",
    paper="TRL's `sigmoid_norm`",
    options={"beta": beta(2.0), "label_smoothing": label_smoothing(0.0)},
)
ROBUST = Loss(
    "robust",
    robust_loss,
    meaning="DPO that is unbiased where a known share of the labels is wrong.",
    equation="[−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε), z as in `dpo`",
    paper="arXiv 2403.00409",
    options={"beta": beta(0.1), "label_smoothing": label_smoothing(0.1)},
)
HINGE = Loss(
    "hinge",
    hinge_loss,
    meaning="A hinge on DPO's margin, as in SLiC.",
    equation="max(0, 1 − z), z as in `dpo`",
    paper="arXiv 2305.10425",
    options={"beta": beta(0.1)},
)
IPO = Loss(
    "ipo",
    ipo_loss,
    meaning="Identity preference optimisation on mean log-ratios, as in TRL.",
    equation="(z − 1/(2β))², z = mean_w d − mean_l d",
    paper="arXiv 2310.12036",
    options={"beta": beta(0.1)},
)
IPO_SUM = Loss(
    "ipo_sum",
    ipo_sum_loss,
    meaning="IPO on summed log-ratios, as in the code of DPO's authors.",
    equation="(z − 1/(2β))², z = Σ_w d − Σ_l d",
    paper="arXiv 2310.12036",
    options={"beta": beta(0.1)},
)
