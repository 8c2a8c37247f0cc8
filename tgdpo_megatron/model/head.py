"""The distributed head: it computes log-probs of the labelled tokens and holds the logits of one tile at a time.

The vocabulary is split over the tensor-parallel ranks, and each rank splits its columns into tiles. It goes over the
tiles and keeps three numbers for each labelled token: the largest logit m, the sum of exp(logit − m), and the logit of
the label. One MAX and one SUM all-reduce, for all models of the micro-batch together, turn these into log-probs.

Backward computes the logits of each tile again, and the probabilities from the logits and the saved log-sum-exp. Where
all columns of the rank fit in one tile, forward keeps the exponentials, and backward uses them instead.

With g the gradient of each log-prob, p the probabilities and q = p − onehot(label):

    ∂ log p(label) / ∂z = −q,  ∂/∂hidden = −g · (q W),  ∂/∂W = qᵀ (−g · hidden)

Where the model caps its logits, z = cap · tanh(raw / cap), q is multiplied by 1 − (z / cap)² as well, and backward
always computes the logits again.

g multiplies rows of H numbers instead of rows of V numbers, which is less work.

Precision, where hidden states and weights have 16 bits: on a GPU the logits are the fp32 sums of their products, not
rounded (products.py says why that matters), and everything that follows is fp32, up to the log-probs. On a CPU each
logit is rounded to 16 bits once, because its matrix products give no more. Backward rounds q and g · hidden to 16 bits,
for they are multiplied again; gradients are added up over the tiles in fp32, on a GPU from products that are not
rounded either.

Columns that only pad the vocabulary are never computed. The result is the same as with a logit of −inf.

Legend: r labels that this context-parallel rank predicts, H hidden size, V vocabulary columns of this rank, k models,
t tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from tgdpo_megatron.model.divergence import Divergence
from tgdpo_megatron.model.products import add_product, product
from tgdpo_megatron.model.vocabulary import VocabShard, WeightGradient, cap_slope, wide_logits


def labelled_logprobs(
    models: Sequence[tuple[Tensor, Tensor]],
    predictors: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    sequence_parallel: bool,
    group: Any,
    softcap: float | None = None,
    divergence: bool = False,
    frozen_time: AbstractContextManager[None] = nullcontext(),  # noqa: B008, it holds nothing
) -> Tensor:
    """Log-prob of each label under each model, nats.

    Args:
        models: Hidden states and output weight of the policy, then of each frozen model. Hidden states are [t, 1, H];
            under sequence parallelism t is split over the tensor-parallel ranks. Weights are [V, H]. Gradient flows to
            the policy only.
        predictors: Index of the hidden state that predicts each label. [r] int64.
        labels: Token ids. [r] int64.
        vocab_size: Vocabulary size without padding; columns beyond it are padding.
        sequence_parallel: Whether hidden states are split along t.
        group: Tensor-parallel process group.
        softcap: cap in cap · tanh(logit / cap), which all the models apply to their logits; None for no cap.
        divergence: Whether to add a row with the divergence of the first model from the second over the whole
            vocabulary, nats.
        frozen_time: Entered while the logits of the frozen models are computed.

    Returns:
        [k, r] fp32, or [k + 1, r] with the divergence as the last row. Only row 0 and the divergence carry gradient.
    """
    (states, weight), *others = models
    frozen = [
        (labelled_states(theirs.detach(), predictors, sequence_parallel, group), matrix) for theirs, matrix in others
    ]
    shard = VocabShard.of(weight, vocab_size, group)
    hidden = labelled_states(states, predictors, sequence_parallel, group)
    policy, constants, log_normalisers = LabelledLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, frozen, labels, shard, softcap, torch.is_grad_enabled(), frozen_time
    )
    results = [policy[None], constants]
    if divergence:
        apart = Divergence.apply(hidden, weight, frozen[0], log_normalisers[:2], shard, softcap)  # type: ignore[no-untyped-call]
        results.append(apart[None])
    return torch.cat(results)


def labelled_states(states: Tensor, predictors: Tensor, sequence_parallel: bool, group: Any) -> Tensor:
    """Hidden states of the labelled tokens on every tensor-parallel rank. [t, 1, H] -> [r, H]."""
    if sequence_parallel:
        states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=True, group=group)
        return states.squeeze(1).index_select(0, predictors)
    copied = copy_to_tensor_model_parallel_region(states.squeeze(1).index_select(0, predictors), group=group)
    if copied.requires_grad:
        copied.register_hook(_check_contiguous)
    return copied


def _check_contiguous(gradient: Tensor) -> None:
    """Megatron's all-reduce before 0.19 returns a gradient that is not contiguous in memory as it was."""
    assert gradient.is_contiguous(), gradient.stride()


class LabelledLogProbs(torch.autograd.Function):
    """Log-probs of the policy, with gradient, and of frozen models, without, and the log-sum-exps of all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        frozen: Sequence[tuple[Tensor, Tensor]],
        labels: Tensor,
        shard: VocabShard,
        softcap: float | None,
        backward_follows: bool,
        frozen_time: AbstractContextManager[None] = nullcontext(),  # noqa: B008, it holds nothing
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The policy is scanned last: what it keeps for backward takes no memory while the frozen models are scanned.
        with frozen_time:
            others = [_scan(states, matrix, labels, shard, softcap)[0] for states, matrix in frozen]
        scan, exponentials = _scan(hidden, weight, labels, shard, softcap, keep=backward_follows)
        largest, total, label_logit = torch.stack([scan, *others], dim=1)  # each [k, r]
        maximum = largest.clone()
        shard.all_reduce(maximum, dist.ReduceOp.MAX)
        sums = torch.stack([total * torch.exp(largest - maximum), label_logit])
        shard.all_reduce(sums, dist.ReduceOp.SUM)
        log_normaliser = maximum + sums[0].log()
        logps = sums[1] - log_normaliser
        ctx.save_for_backward(hidden, weight, labels, logps[0], log_normaliser[0], largest[0])
        ctx.shard, ctx.softcap = shard, softcap
        ctx.exponentials = exponentials  # not saved as the others are, so that backward can free it on the way
        constants = logps[1:]
        ctx.mark_non_differentiable(constants, log_normaliser)
        return logps[0].clone(), constants, log_normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, logps, log_normaliser, largest = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        exponentials, ctx.exponentials = ctx.exponentials, None
        descent = -grad[:, None]
        scaled = (descent * hidden).to(hidden.dtype)
        # q of the label is p − 1. It is computed from the log-prob, because a p near 1 can round to 1 in 16 bits, and
        # p − 1 would then be 0.
        at_label = torch.expm1(logps)[:, None].to(hidden.dtype)
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        sink = WeightGradient(weight)
        for tile in shard.tiles(len(labels), hidden.device):
            slope = None
            if exponentials is None:
                logits = _logits(hidden, weight[tile], ctx.softcap)
                slope = cap_slope(logits, ctx.softcap)
                wide = _below(logits, log_normaliser).exp_()
                del logits
            else:
                wide = exponentials.mul_(torch.exp(largest - log_normaliser)[:, None])
                del exponentials  # of the only tile
            probabilities = wide.to(hidden.dtype)
            del wide
            inside, column = shard.owned(labels, tile)
            others = probabilities.gather(1, column[:, None])
            apart = probabilities.scatter_(1, column[:, None], at_label.where(inside[:, None], others))
            if slope is not None:
                apart.mul_(slope)
            add_product(grad_hidden, apart, weight[tile])
            sink.add(tile, apart, scaled)
            del probabilities, apart, slope  # before the next tile is made
        return grad_hidden.mul_(descent).to(hidden.dtype), sink.result(), *[None] * 6


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits of a tile, fp32. [r, H] and [tile, H] -> [r, tile].

    They have 16 bits only on a GPU whose torch cannot give the fp32 sums (products.py), and only without a cap, which
    needs finer numbers. On a CPU they are widened at once, because operations on mixed dtypes are slow there.
    """
    if hidden.is_cuda and softcap is None:
        return product(hidden, weight.t())
    return wide_logits(hidden, weight, softcap)


def _below(logits: Tensor, level: Tensor) -> Tensor:
    """logits − level in fp32. Logits that are fp32 already are overwritten. [r, tile] and [r] -> [r, tile]."""
    return logits.sub_(level[:, None]) if logits.dtype == torch.float32 else logits - level[:, None]


def _scan(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, softcap: float | None, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Go over this rank's columns tile by tile.

    Returns:
        For each label the largest logit m, the sum of exp(logit − m), and the label's logit, which is 0 on ranks that
        do not hold the label's column. [3, r] fp32. Then, with `keep`, where all columns fit in one tile and there is
        no cap, every exp(logit − m) for backward, [r, V] fp32; otherwise None.
    """
    largest = torch.full(labels.shape, float("-inf"), device=labels.device)
    total = torch.zeros(labels.shape, device=labels.device)
    label_logit = torch.zeros(labels.shape, device=labels.device)
    kept = None
    for tile in shard.tiles(len(labels), hidden.device):
        logits = _logits(hidden, weight[tile], softcap)
        inside, column = shard.owned(labels, tile)
        label_logit += logits.gather(1, column[:, None]).squeeze(1) * inside
        higher = torch.maximum(largest, logits.amax(dim=1).float())
        exponentials = _below(logits, higher).exp_()
        total = total * torch.exp(largest - higher) + exponentials.sum(dim=1)
        largest = higher
        kept = exponentials if keep and softcap is None and logits.size(1) == shard.columns else None
        del logits, exponentials  # before the next tile is made
    return torch.stack([largest, total, label_logit]), kept
