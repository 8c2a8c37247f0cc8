"""The likeliest next token, over a vocabulary that is split over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tgdpo_megatron.model.head import labelled_states
from tgdpo_megatron.model.products import product
from tgdpo_megatron.model.vocabulary import VocabShard


@torch.no_grad()
def likeliest_tokens(
    states: Tensor, weight: Tensor, predictors: Tensor, *, vocab_size: int, sequence_parallel: bool, group: Any
) -> Tensor:
    """The token with the largest logit after each predictor; of equal ones the first. Collective over `group`.

    Args:
        states: Hidden states [t, 1, H], split along t under sequence parallelism.
        weight: This rank's rows of the output weight. [V, H].
        predictors: Index of the hidden states to predict from. [r] int64.
        vocab_size, sequence_parallel, group: As for labelled_logprobs.

    Returns:
        [r] int64, on every tensor-parallel rank.
    """
    shard = VocabShard.of(weight, vocab_size, group)
    rows = labelled_states(states, predictors, sequence_parallel, group)
    if shard.columns:
        largest, column = product(rows, weight[: shard.columns].t()).float().max(dim=1)
    else:  # this rank holds padding only
        largest = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
        column = predictors.new_zeros(len(rows))
    ranks = 1 if group is None else group.size()
    if ranks == 1:
        return column
    all_largest = [torch.empty_like(largest) for _ in range(ranks)]
    all_tokens = [torch.empty_like(column) for _ in range(ranks)]
    dist.all_gather(all_largest, largest, group=group)
    dist.all_gather(all_tokens, column + shard.start, group=group)
    best = torch.stack(all_largest).argmax(dim=0)
    return torch.stack(all_tokens).gather(0, best[None])[0]
