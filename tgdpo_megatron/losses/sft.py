"""Supervised fine-tuning on the chosen responses of preference pairs.

This differs from TRL's SFT: the mean is taken over each response's tokens and then over pairs, not over all tokens of
the batch, so that the unit of every loss here is the pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tgdpo_megatron.losses.declaration import Loss
from tgdpo_megatron.losses.pairs import CHOSEN, Pairs

if TYPE_CHECKING:
    from torch import Tensor


def sft_loss(policy: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Negative mean log-prob of the chosen response's tokens.

    Args:
        policy: Token log-probs, nats. [R]; carries gradient.
        pairs: Pair and side of each token. Rejected tokens are ignored and may be absent.

    Returns:
        Loss of each pair, nats per token, and margin of each pair, which is 0 since SFT compares nothing. Both [P].
    """
    chosen_logps, chosen_tokens = pairs.sums(policy)[:, 0], pairs.lengths()[:, 0]
    losses = -chosen_logps / chosen_tokens.clamp(min=1)
    return losses, losses.detach().new_zeros(pairs.num_pairs)


SFT = Loss(
    "sft",
    sft_loss,
    meaning="Supervised fine-tuning on the chosen responses alone.",
    equation="−mean_w ℓ",
    paper="–",
    sides=(CHOSEN,),
)
