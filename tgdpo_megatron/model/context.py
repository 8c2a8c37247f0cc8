"""What context-parallel ranks compute for the labelled tokens of their own rows, brought together.

Every rank of the group then computes the same loss, whose gradient must count once. In backward each rank therefore
takes the part of its own labels alone, without a sum over the group. The ranks' gradients of the weights are added up
afterwards, with those of the data-parallel ranks. It is otherwise in attention, which gathers keys and values: there
the queries of each rank give gradients to the keys of every rank, and these are summed. The pairs are counted once as
well, because one rank reports their number (Batch.counts_pairs).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from tgdpo_megatron.data.batch import ContextLabels


def gather_labelled(values: Tensor, context: ContextLabels | None, group: Any) -> Tensor:
    """Gather numbers of labelled tokens, so that every context-parallel rank has those of the whole micro-batch.

    So no formula depends on how rows were split.

    Args:
        values: k numbers for each of the r labelled tokens of this rank. [k, r]. They may carry gradient.
        context: Where the labelled tokens of all ranks are; None without context parallelism.
        group: Context-parallel process group.

    Returns:
        [k, R], in the order of the micro-batch.
    """
    if context is None:
        return values
    padded = F.pad(values, (0, context.most - values.size(1))).t().contiguous()
    gathered = gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=False, group=group)
    return gathered.index_select(0, context.order).t()
