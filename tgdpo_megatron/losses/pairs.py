"""Which token belongs to which response of which pair, and the two sums every loss is made of.

Legend: R labelled response tokens of a micro-batch, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True)
class Pairs:
    """The pair and the side of each labelled token.

    Attributes:
        pair: Index of the token's pair, in 0..num_pairs-1. [R] int64.
        side: CHOSEN or REJECTED. [R] int64.
        num_pairs: P. Pairs without tokens are allowed and sum to 0.
    """

    pair: Tensor
    side: Tensor
    num_pairs: int

    def sums(self, per_token: Tensor) -> Tensor:
        """Sum a per-token number over each response. [R] -> [P, 2] (chosen, rejected); differentiable."""
        if per_token.shape != self.pair.shape:
            raise ValueError(f"expected one number per token, {tuple(self.pair.shape)}, got {tuple(per_token.shape)}")
        flat = per_token.new_zeros(2 * self.num_pairs)
        return flat.index_add(0, 2 * self.pair + self.side, per_token).view(self.num_pairs, 2)

    def difference(self, per_token: Tensor) -> Tensor:
        """Sum over the chosen response minus sum over the rejected one. [R] -> [P]; differentiable."""
        chosen, rejected = self.sums(per_token).unbind(dim=1)
        return chosen - rejected

    def lengths(self) -> Tensor:
        """Number of labelled tokens of each response. [P, 2] int64."""
        return self.sums(torch.ones_like(self.pair))
