"""The divergence of the policy from the reference at each labelled token, over the whole vocabulary.

    K = KL(π_ref ‖ π) = Σ_v π_ref(v) (z_ref(v) − z(v)) − lse_ref + lse,      ∂K/∂z(v) = π(v) − π_ref(v)

z are the logits, soft-capped where the models cap them. lse is their log-sum-exp over all ranks, which the head has
computed already. Each rank sums over its columns tile by tile, with one tile of logits of each model in memory. One SUM
all-reduce adds the sums of the ranks. Backward computes the tiles again.

Legend as in head.py: r labelled tokens, H hidden size, V vocabulary columns of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tgdpo_megatron.model.products import add_product
from tgdpo_megatron.model.vocabulary import VocabShard, WeightGradient, cap_slope, wide_logits


class Divergence(torch.autograd.Function):
    """KL(π_ref ‖ π) at each labelled token, nats. [r] fp32. Gradient flows to the policy only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        reference: tuple[Tensor, Tensor],
        log_normalisers: Tensor,
        shard: VocabShard,
        softcap: float | None,
    ) -> Tensor:
        """
        Args:
            hidden, weight: The policy's hidden states of the labelled tokens [r, H] and output matrix [V, H].
            reference: The reference's hidden states [r, H] and output matrix [V, H].
            log_normalisers: Log-sum-exp of both models' logits over all ranks. [2, r] fp32, the policy's first.
            softcap: As for labelled_logprobs.
        """
        of_policy, of_reference = log_normalisers
        difference = torch.zeros_like(of_policy)
        for tile in shard.tiles(len(hidden), hidden.device):
            logits = wide_logits(hidden, weight[tile], softcap)
            reference_logits = wide_logits(reference[0], reference[1][tile], softcap)
            apart = logits.neg_().add_(reference_logits)
            difference += reference_logits.sub_(of_reference[:, None]).exp_().mul_(apart).sum(dim=1)
            del logits, reference_logits, apart  # before the next tiles are made
        shard.all_reduce(difference, dist.ReduceOp.SUM)
        ctx.save_for_backward(hidden, weight, *reference, log_normalisers)
        ctx.shard, ctx.softcap = shard, softcap
        return difference - of_reference + of_policy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """∂K/∂z = π − π_ref, tile by tile."""
        hidden, weight, reference_hidden, reference_weight, log_normalisers = ctx.saved_tensors
        of_policy, of_reference = log_normalisers
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        sink = WeightGradient(weight)
        for tile in ctx.shard.tiles(len(hidden), hidden.device):
            logits = wide_logits(hidden, weight[tile], ctx.softcap)
            reference_logits = wide_logits(reference_hidden, reference_weight[tile], ctx.softcap)
            slope = cap_slope(logits, ctx.softcap)
            grad_logits = logits.sub_(of_policy[:, None]).exp_()
            grad_logits -= reference_logits.sub_(of_reference[:, None]).exp_()
            if slope is not None:
                grad_logits *= slope
            narrow = grad_logits.mul_(grad[:, None]).to(hidden.dtype)
            add_product(grad_hidden, narrow, weight[tile])
            sink.add(tile, narrow, hidden)
            del logits, reference_logits, slope, grad_logits, narrow
        return grad_hidden.to(hidden.dtype), sink.result(), None, None, None, None
