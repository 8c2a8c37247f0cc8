"""One rank's columns of the vocabulary: which they are, how they are split into tiles and capped, where their gradient
goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tgdpo_megatron.config.constants import MIN_TILE_COLUMNS, TILE_ELEMENTS
from tgdpo_megatron.model.products import add_product, product


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary columns of one tensor-parallel rank.

    Attributes:
        start: Token id of the first column.
        columns: Number of columns, without padding; may be 0.
        group: Tensor-parallel process group, or None for an unsplit vocabulary.
    """

    start: int
    columns: int
    group: Any = None

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: Any) -> VocabShard:
        """The shard that a rank's output weight [V, H] holds, given the vocabulary size without padding."""
        rank = group.rank() if group is not None else 0
        start = rank * weight.size(0)
        return cls(start, max(0, min(weight.size(0), vocab_size - start)), group)

    def all_reduce(self, values: Tensor, op: Any) -> None:
        """Reduce in place over the shards of the vocabulary."""
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(values, op=op, group=self.group)

    def tiles(self, tokens: int, device: torch.device) -> Iterator[slice]:
        """Ranges of columns, as wide as the tile budget allows for this number of tokens."""
        width = max(MIN_TILE_COLUMNS, TILE_ELEMENTS[device.type] // max(1, tokens))
        for first in range(0, self.columns, width):
            yield slice(first, min(first + width, self.columns))

    def owned(self, labels: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """Which labels lie in a tile, [r] bool, and their columns in the tile, 0 for other labels, [r] int64."""
        column = labels - (self.start + tile.start)
        inside = (column >= 0) & (column < tile.stop - tile.start)
        return inside, column.where(inside, 0)


def wide_logits(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    """Logits of a tile in fp32, capped where there is a cap. [r, H] and [tile, H] -> [r, tile]."""
    return capped(product(hidden, weight.t()).float(), cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), written into `logits`; `logits` as they are without a cap."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def cap_slope(logits: Tensor, cap: float | None) -> Tensor | None:
    """The derivative of capped logits by the logits before the cap: 1 − (capped / cap)². None without a cap."""
    return None if cap is None else (logits / cap).square_().neg_().add_(1)


class WeightGradient:
    """Collects the gradient of the output weight, directly in Megatron's fp32 `main_grad` where the weight has one.

    Megatron's data-parallel hook then only has to be told that the gradient is in `main_grad` already.
    """

    def __init__(self, weight: Any) -> None:
        self.weight = weight
        self.into_main_grad = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
        total = weight.main_grad if self.into_main_grad else torch.zeros_like(weight, dtype=torch.float32)
        self.total: Tensor = total

    def add(self, tile: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        add_product(self.total[tile], grad_logits.t(), hidden)

    def result(self) -> Tensor | None:
        """The gradient to return to autograd; None if the gradient is in `main_grad` already."""
        if not self.into_main_grad:
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        if not getattr(self.weight, "zero_out_wgrad", False):  # set where a tied embedding's gradient follows
            # Megatron's hook looks for a gradient before it reads `grad_added_to_main_grad`. A single zero, expanded
            # to the weight's shape, is enough and takes no memory.
            self.weight.grad = self.weight.new_zeros(()).expand_as(self.weight)
        return None
