"""The distributed head: hidden states in, log-probs of the labelled tokens out, never full logits.

The vocabulary is split over tensor-parallel ranks. Each rank walks over its columns tile by tile and keeps
three numbers per labelled token: the largest logit, the sum of exponentials below it, and the label's own
logit. One MAX and one SUM all-reduce, for all models of the micro-batch together, turn them into log-probs.
Backward computes the logits again, tile by tile, from the saved log-sum-exp; columns that fit one tile are kept.

Columns that only pad the vocabulary are never computed, which is the same as a logit of −inf.

Legend: R labelled tokens, H hidden size, V vocabulary columns of this rank, k models, S hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

# Logits in memory at once. Large enough that the matrix products run at full rate.
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary columns of one tensor-parallel rank.

    Attributes:
        start: First column's token id.
        columns: Real columns, without padding; may be 0.
        group: Tensor-parallel process group, or None for an unsplit vocabulary.
    """

    start: int
    columns: int
    group: Any = None

    @classmethod
    def of(cls, weight: Tensor, vocab_size: int, group: Any) -> VocabShard:
        """The shard that `weight` [V, H] is, given the real vocabulary size."""
        rank = group.rank() if group is not None else 0
        start = rank * weight.size(0)
        return cls(start, max(0, min(weight.size(0), vocab_size - start)), group)

    def all_reduce(self, values: Tensor, op: Any) -> None:
        """Reduce in place over the shards of the vocabulary."""
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(values, op=op, group=self.group)

    def tiles(self, rows: int, device: torch.device) -> Iterator[slice]:
        """Column ranges whose logits for `rows` tokens fit the tile budget."""
        width = max(128, TILE_ELEMENTS[device.type] // max(1, rows))
        for first in range(0, self.columns, width):
            yield slice(first, min(first + width, self.columns))

    def owned(self, labels: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """Which labels lie in a tile, and their column in it (0 where not). Both [R]."""
        column = labels - (self.start + tile.start)
        inside = (column >= 0) & (column < tile.stop - tile.start)
        return inside, column.where(inside, 0)


def labelled_logprobs(
    models: Sequence[tuple[Tensor, Tensor]],
    rows: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    sequence_parallel: bool,
    group: Any,
) -> Tensor:
    """Log-prob of each label under each model, nats.

    Args:
        models: (hidden states, output weight) of the policy, then of frozen models. Hidden states are
            [S, 1, H], S cut over the tensor-parallel ranks under sequence parallelism; weights [V, H].
            Gradient flows to the first model alone.
        rows: Which hidden state predicts each label. [R] int64.
        labels: Token ids. [R] int64.
        vocab_size: Real vocabulary size; columns beyond it are padding.
        sequence_parallel: Whether hidden states are cut along S.
        group: Tensor-parallel process group.

    Returns:
        [k, R] fp32. Only row 0 carries gradient.
    """
    (states, weight), *others = models
    frozen = [
        (_labelled_rows(theirs.detach(), rows, sequence_parallel, group).detach(), matrix.detach())
        for theirs, matrix in others
    ]
    shard = VocabShard.of(weight, vocab_size, group)
    hidden = _labelled_rows(states, rows, sequence_parallel, group)
    policy, constants = _LabelledLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, frozen, labels, shard
    )
    return torch.cat([policy[None], constants])


def _labelled_rows(states: Tensor, rows: Tensor, sequence_parallel: bool, group: Any) -> Tensor:
    """Hidden states of the labelled tokens on every tensor-parallel rank. [S, 1, H] -> [R, H]."""
    if sequence_parallel:
        states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=True, group=group)
        return states.squeeze(1).index_select(0, rows)
    return copy_to_tensor_model_parallel_region(states.squeeze(1).index_select(0, rows), group=group)


class _LabelledLogProbs(torch.autograd.Function):
    """Log-probs of the policy (with gradient) and of frozen models (without), reduced together."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        frozen: Sequence[tuple[Tensor, Tensor]],
        labels: Tensor,
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        scan, exponentials = _scan(hidden, weight, labels, shard)
        scans = [scan, *(_scan(states, matrix, labels, shard)[0] for states, matrix in frozen)]
        largest, total, label_logit = torch.stack(scans, dim=1)  # each [k, R]
        maximum = largest.clone()
        shard.all_reduce(maximum, dist.ReduceOp.MAX)
        sums = torch.stack([total * torch.exp(largest - maximum), label_logit])
        shard.all_reduce(sums, dist.ReduceOp.SUM)
        log_normaliser = maximum + sums[0].log()
        logps = sums[1] - log_normaliser
        ctx.save_for_backward(hidden, weight, labels, log_normaliser[0], exponentials, largest[0])
        ctx.shard = shard
        others = logps[1:]
        ctx.mark_non_differentiable(others)
        return logps[0].clone(), others

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_normaliser, exponentials, largest = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        sink = _WeightGradient(weight)
        for tile in shard.tiles(len(labels), hidden.device):
            if exponentials is None:
                logits = torch.mm(hidden, weight[tile].t()).float()  # [R, tile]
                grad_logits = logits.sub_(log_normaliser[:, None]).exp_().mul_(-grad[:, None])  # −p · g
            else:
                grad_logits = exponentials.mul_((-grad * torch.exp(largest - log_normaliser))[:, None])  # the same
            inside, column = shard.owned(labels, tile)
            grad_logits.scatter_add_(1, column[:, None], (grad * inside)[:, None])  # + onehot · g
            narrow = grad_logits.to(hidden.dtype)
            _add_product(grad_hidden, narrow, weight[tile])
            sink.add(tile, narrow, hidden)
        return grad_hidden.to(hidden.dtype), sink.result(), None, None, None


def _scan(hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor | None]:
    """Largest logit, sum of exponentials below it, and label's logit over this rank's columns. [3, R] fp32.

    And, where those columns fit one tile, the exponentials themselves, [R, V] fp32: backward need not repeat them.
    """
    largest = torch.full(labels.shape, float("-inf"), device=labels.device)
    total = torch.zeros(labels.shape, device=labels.device)
    label_logit = torch.zeros(labels.shape, device=labels.device)
    exponentials = None
    for tile in shard.tiles(len(labels), hidden.device):
        logits = torch.mm(hidden, weight[tile].t()).float()  # [R, tile]
        inside, column = shard.owned(labels, tile)
        label_logit += logits.gather(1, column[:, None]).squeeze(1) * inside
        higher = torch.maximum(largest, logits.amax(dim=1))
        exponentials = logits.sub_(higher[:, None]).exp_()
        total = total * torch.exp(largest - higher) + exponentials.sum(dim=1)
        largest = higher
    only_tile = exponentials is not None and exponentials.size(1) == shard.columns
    return torch.stack([largest, total, label_logit]), exponentials if only_tile else None


def _add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target += left @ right, in the dtype of `target`."""
    if left.dtype == target.dtype:
        target.addmm_(left, right)
    else:
        target.add_(torch.mm(left, right))


class _WeightGradient:
    """Where the output weight's gradient goes: straight into Megatron's fp32 `main_grad` where there is one.

    Megatron's data-parallel hook then only has to be told that it is there.
    """

    def __init__(self, weight: Any) -> None:
        self.weight = weight
        self.into_main_grad = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
        total = weight.main_grad if self.into_main_grad else torch.zeros_like(weight, dtype=torch.float32)
        self.total: Tensor = total

    def add(self, tile: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        _add_product(self.total[tile], grad_logits.t(), hidden)

    def result(self) -> Tensor | None:
        """What autograd is given: nothing, if the gradient is in `main_grad` already."""
        if not self.into_main_grad:
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        if not getattr(self.weight, "zero_out_wgrad", False):  # a tied embedding's own gradient follows
            # Megatron's hook wants to see a gradient before it looks at the mark: one without storage will do.
            self.weight.grad = self.weight.new_zeros(()).expand_as(self.weight)
        return None
