"""Which token belongs to which response of which pair, and the sums that losses are made of.

Legend: R labelled response tokens of a micro-batch, P pairs.

This file and the losses call methods of tensors and do not import torch at the top. Loading torch takes seconds, and
settings are checked against the losses' declarations before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
        return flat.index_add(0, self.response, per_token).view(self.num_pairs, 2)

    def difference(self, per_token: Tensor) -> Tensor:
        """Sum over the chosen response minus sum over the rejected one. [R] -> [P]; differentiable."""
        chosen, rejected = self.sums(per_token).unbind(dim=1)
        return chosen - rejected

    def lengths(self) -> Tensor:
        """Number of labelled tokens of each response. [P, 2] int64."""
        return self.sums(self.pair.new_ones(self.pair.shape))

    @property
    def response(self) -> Tensor:
        """Index of each token's response: twice its pair, plus its side. [R] int64."""
        return 2 * self.pair + self.side

    def per_length(self, per_token: Tensor) -> Tensor:
        """Divide a per-token number by its response's length, so that sums become means. [R] -> [R].

        A response without tokens has no number to divide.
        """
        return per_token / self.lengths().flatten()[self.response]

    def last(self) -> Tensor:
        """Whether each token is the last of its response. [R] bool. A response's tokens must be adjacent, in order."""
        following = self.response.roll(-1)
        last = following != self.response
        if len(last):
            last[-1] = True
        return last

    def spread(self, per_token: Tensor) -> Tensor:
        """Largest minus smallest number of each response, 0 for a response without tokens. [R] -> [2 P]."""
        ends = [
            per_token.new_zeros(2 * self.num_pairs).scatter_reduce(0, self.response, per_token, how, include_self=False)
            for how in ("amax", "amin")
        ]
        return ends[0] - ends[1]

    def rank(self, per_token: Tensor) -> Tensor:
        """Rank of each token in its response by a number: 0 for the largest, then 1, … [R] -> [R] int64.

        Tokens with equal numbers keep their order.
        """
        by_number = per_token.argsort(descending=True, stable=True)
        order = by_number[self.response[by_number].argsort(stable=True)]  # response by response, largest first
        lengths = self.lengths().flatten()
        starts = lengths.cumsum(0) - lengths
        ranks = order.new_empty(order.shape)
        ranks[order] = order.new_ones(order.shape).cumsum(0) - 1 - starts[self.response[order]]
        return ranks


def log_sigmoid(margin: Tensor) -> Tensor:
    """log σ(z), exact where σ(z) rounds to 0 or 1. [P] -> [P]."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(margin)
