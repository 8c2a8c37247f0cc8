"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290), the limit case of TGDPO."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tgdpo_megatron.losses.pairs import Pairs


def dpo(policy: Tensor, pairs: Pairs, reference: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """L = −log σ(z),  z = Σ_chosen β (ℓ − ℓ_ref) − Σ_rejected β (ℓ − ℓ_ref).

    Sums over tokens, not means: a longer response can move z further.

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token.
        reference: The same tokens under the frozen reference, nats. [R]; constant.
        beta: Inverse temperature, > 0, unitless.

    Returns:
        Loss L and margin z of each pair. Both [P], unreduced.
    """
    margin = pairs.difference(beta * (policy - reference))
    return -logsigmoid(margin), margin
