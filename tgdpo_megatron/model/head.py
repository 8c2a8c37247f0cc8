"""The distributed head: hidden states in, log-probs of the labelled tokens out, never full logits.

The vocabulary is split over tensor-parallel ranks. Each rank walks over its columns tile by tile and keeps
three numbers per labelled token: the largest logit, the sum of exponentials below it, and the label's own
logit. One MAX and one SUM all-reduce, for all models of the micro-batch together, turn them into log-probs.
Backward computes the logits again, tile by tile, and from the saved log-sum-exp the probabilities; where all columns
fit one tile, its exponentials are kept instead.

    ∂ log p(label) / ∂z = onehot(label) − p,  so with g the gradient of each log-prob and q = p − onehot
    ∂/∂hidden = −g · (q W),  ∂/∂W = qᵀ (−g · hidden)

g is multiplied into rows of H numbers, not of V; on a GPU 16-bit logits go to fp32 in the subtraction, not in a copy.

Columns that only pad the vocabulary are never computed, which is the same as a logit of −inf.

Legend: R labelled tokens, H hidden size, V vocabulary columns of this rank, k models, S hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from tgdpo_megatron.model.divergence import Divergence
from tgdpo_megatron.model.vocabulary import VocabShard, WeightGradient, add_product


def labelled_logprobs(
    models: Sequence[tuple[Tensor, Tensor]],
    predictors: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    sequence_parallel: bool,
    group: Any,
    divergence: bool = False,
) -> Tensor:
    """Log-prob of each label under each model, nats.

    Args:
        models: (hidden states, output weight) of the policy, then of frozen models. Hidden states are
            [S, 1, H], S cut over the tensor-parallel ranks under sequence parallelism; weights [V, H].
            Gradient flows to the first model alone.
        predictors: Which hidden state predicts each label. [R] int64.
        labels: Token ids. [R] int64.
        vocab_size: Real vocabulary size; columns beyond it are padding.
        sequence_parallel: Whether hidden states are cut along S.
        group: Tensor-parallel process group.
        divergence: Add a row: the divergence of the first model from the second, over the whole vocabulary, nats.

    Returns:
        [k, R] fp32, or [k + 1, R]. Only row 0, and the divergence, carry gradient.
    """
    (states, weight), *others = models
    frozen = [
        (_labelled_states(theirs.detach(), predictors, sequence_parallel, group), matrix) for theirs, matrix in others
    ]
    shard = VocabShard.of(weight, vocab_size, group)
    hidden = _labelled_states(states, predictors, sequence_parallel, group)
    policy, constants, log_normalisers = LabelledLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, frozen, labels, shard, torch.is_grad_enabled()
    )
    results = [policy[None], constants]
    if divergence:
        apart = Divergence.apply(hidden, weight, frozen[0], log_normalisers[:2], shard)  # type: ignore[no-untyped-call]
        results.append(apart[None])
    return torch.cat(results)


def _labelled_states(states: Tensor, predictors: Tensor, sequence_parallel: bool, group: Any) -> Tensor:
    """Hidden states of the labelled tokens on every tensor-parallel rank. [S, 1, H] -> [R, H]."""
    if sequence_parallel:
        states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=True, group=group)
        return states.squeeze(1).index_select(0, predictors)
    return copy_to_tensor_model_parallel_region(states.squeeze(1).index_select(0, predictors), group=group)


class LabelledLogProbs(torch.autograd.Function):
    """Log-probs of the policy (with gradient) and of frozen models (without), reduced together; and log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        frozen: Sequence[tuple[Tensor, Tensor]],
        labels: Tensor,
        shard: VocabShard,
        backward_follows: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The policy last: what is kept for backward is not there yet while the others are scanned.
        others = [_scan(states, matrix, labels, shard)[0] for states, matrix in frozen]
        scan, exponentials = _scan(hidden, weight, labels, shard, keep=backward_follows)
        largest, total, label_logit = torch.stack([scan, *others], dim=1)  # each [k, R]
        maximum = largest.clone()
        shard.all_reduce(maximum, dist.ReduceOp.MAX)
        sums = torch.stack([total * torch.exp(largest - maximum), label_logit])
        shard.all_reduce(sums, dist.ReduceOp.SUM)
        log_normaliser = maximum + sums[0].log()
        logps = sums[1] - log_normaliser
        ctx.save_for_backward(hidden, weight, labels, logps[0], log_normaliser[0], exponentials, largest[0])
        ctx.shard = shard
        constants = logps[1:]
        ctx.mark_non_differentiable(constants, log_normaliser)
        return logps[0].clone(), constants, log_normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, logps, log_normaliser, exponentials, largest = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        descent = -grad[:, None]
        scaled = (descent * hidden).to(hidden.dtype)
        # p − 1 of the label. Made from its log-prob: a p near 1 that was rounded to 16 bits would leave nothing of it.
        at_label = torch.expm1(logps)[:, None].to(hidden.dtype)
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        sink = WeightGradient(weight)
        for tile in shard.tiles(len(labels), hidden.device):
            if exponentials is None:
                logits = _logits(hidden, weight[tile])
                wide = _below(logits, log_normaliser).exp_()
                del logits
            else:
                wide = exponentials.mul_(torch.exp(largest - log_normaliser)[:, None])
            probabilities = wide.to(hidden.dtype)
            del wide
            inside, column = shard.owned(labels, tile)
            others = probabilities.gather(1, column[:, None])
            apart = probabilities.scatter_(1, column[:, None], at_label.where(inside[:, None], others))
            add_product(grad_hidden, apart, weight[tile])
            sink.add(tile, apart, scaled)
            del probabilities, apart  # before the next tile is made
        return grad_hidden.mul_(descent).to(hidden.dtype), sink.result(), None, None, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[R, H] and [tile, H] -> [R, tile], in their dtype; on a CPU, which is slow where dtypes mix, in fp32."""
    logits = torch.mm(hidden, weight.t())
    return logits.float() if logits.device.type == "cpu" else logits


def _below(logits: Tensor, level: Tensor) -> Tensor:
    """logits − level, in fp32; over the logits where they are fp32 already. [R, tile] and [R] -> [R, tile]"""
    return logits.sub_(level[:, None]) if logits.dtype == torch.float32 else logits - level[:, None]


def _scan(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Largest logit, sum of exponentials below it, and label's logit over this rank's columns. [3, R] fp32.

    And, with `keep`, where those columns fit one tile, the exponentials themselves, [R, V] fp32: backward need not
    repeat them.
    """
    largest = torch.full(labels.shape, float("-inf"), device=labels.device)
    total = torch.zeros(labels.shape, device=labels.device)
    label_logit = torch.zeros(labels.shape, device=labels.device)
    kept = None
    for tile in shard.tiles(len(labels), hidden.device):
        logits = _logits(hidden, weight[tile])
        inside, column = shard.owned(labels, tile)
        label_logit += logits.gather(1, column[:, None]).squeeze(1) * inside
        higher = torch.maximum(largest, logits.amax(dim=1).float())
        exponentials = _below(logits, higher).exp_()
        total = total * torch.exp(largest - higher) + exponentials.sum(dim=1)
        largest = higher
        kept = exponentials if keep and logits.size(1) == shard.columns else None
        del logits, exponentials  # before the next tile is made
    return torch.stack([largest, total, label_logit]), kept
