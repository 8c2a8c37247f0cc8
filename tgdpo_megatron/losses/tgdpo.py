"""Token-level guided DPO (TGDPO, ICML 2025, arXiv 2506.14574).

DPO whose every response token is weighted by a token-level reward r̂: in the paper the scaled log-ratio of an
already aligned guidance model to the reference, here from any source (rewards.py). What to know beside the paper:

- r̂ is a constant; no gradient flows through the guidance.
- The rejected side has the opposite sign: a token the guidance dislikes (r̂ < 0) weighs *more* there.
- Sums over tokens, no length normalisation; weights are not clamped, so |r̂| > 1/α makes one negative
  (reported as `tgdpo/weight_neg_frac`).
- The authors' code scales r̂ by the training β; that is the default here (`beta_r` unset).
- α = 0, or guidance = reference, is DPO exactly.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from tgdpo_megatron.losses.pairs import CHOSEN, Pairs


def tgdpo(
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
    return -logsigmoid(margin), margin


def token_weights(rewards: Tensor, pairs: Pairs, *, alpha: float) -> Tensor:
    """f(r̂) = 1 + α r̂ on chosen tokens, 1 − α r̂ on rejected ones. [R] -> [R]."""
    return 1 + alpha * rewards.where(pairs.side == CHOSEN, -rewards)
