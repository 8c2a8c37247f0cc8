"""Attention by a plan (data/attention_plan.py), with grouped queries, sliding windows and soft-caps.

A plan is a list of blocks: queries, and keys of which the last query sees all. Without a soft-cap and a window that
matters, a kernel for a GPU computes all blocks in one call (kernels.py), or torch's scaled_dot_product_attention
computes one block after another. Where a block has more keys than queries, torch needs a mask. On a CPU it is given
one, for some hundred queries at a time.

Otherwise attention is computed here, one strip of queries after another: with a soft-cap, which no kernel of torch has;
with a window, for which a mask would take memory for every pair of tokens; and on a GPU without a kernel for a block
that has more keys than queries, because torch's own would keep the mask and the scores:

    s = scale · q kᵀ,   c = cap · tanh(s / cap),   p = softmax(c),   o = p v
    ∂L/∂c = p (∂L/∂p − Σ ∂L/∂o · o),   ∂L/∂s = ∂L/∂c · (1 − tanh²(s / cap))

Backward computes the scores of a block again from queries and keys, and the probabilities from the log-sum-exps, which
forward keeps. Scores and probabilities are fp32.

Under context parallelism the keys and values of all context-parallel ranks are gathered first. That happens inside
core attention, so that with selective recompute they are gathered again in backward and not kept.

Legend: t tokens of this rank, q queries and k keys of a block, K keys of all blocks, G key-value heads, N query heads
of each, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from tgdpo_megatron.config.constants import MASK_MULTIPLE, MASKED_ROWS, attention_rows, round_up
from tgdpo_megatron.data.attention_plan import AttentionPlan
from tgdpo_megatron.model.kernels import Kernel


class PlanParams(PackedSeqParams):  # type: ignore[misc]
    """The attention plan of a micro-batch, in the place where Megatron hands on the boundaries of packed sequences."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__(qkv_format="sbhd")  # Megatron's other format would start positions anew in each block
        self.plan = plan


class PlanAttention(MegatronModule):  # type: ignore[misc]
    """Megatron's core attention, over the blocks of a plan.

    Args:
        softcap: cap, which bounds the scores; None for no soft-cap.
        kernel: Class of a kernel that computes all blocks at once; None to compute them one after another.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        softcap: float | None = None,
        kernel: type[Kernel] | None = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.softcap = softcap
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # Megatron counts the tokens before the query, and this class the query as well.
        self.window = config.window_size[0] + 1 if windowed else None
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.kernel = None
        if kernel is not None and softcap is None and self.window is None:
            ranks = config.tensor_model_parallel_size
            heads, groups = config.num_attention_heads // ranks, max(1, config.num_query_groups // ranks)
            self.kernel = kernel(heads, groups, config.kv_channels, self.scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PlanParams | None = None,
    ) -> Tensor:
        """[t, 1, heads, channels] each (fewer heads in key and value) -> [t, 1, heads · channels]."""
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None
        tokens, batch = query.shape[:2]
        plan = packed_seq_params.plan
        if plan.key_rows is not None:
            key, value = keys_and_values(key, value, plan.key_rows, self.context_group)
        if self.kernel is not None:
            found = self.kernel(query.squeeze(1), key.squeeze(1), value.squeeze(1), plan)
            return found.reshape(tokens, batch, -1)
        # Blocks are split and joined along the first axis, the tokens, where a split needs no copy. With the heads as
        # the first axis, everything would be copied twice.
        blocks = zip(
            query.split(plan.query_lengths), key.split(plan.key_lengths), value.split(plan.key_lengths), strict=True
        )
        return torch.cat([self._attend(*block, plan.most_keys) for block in blocks]).reshape(tokens, batch, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, most: int) -> Tensor:
        """Attention of one block. [q, 1, heads, D] and twice [k, 1, G, D] -> [q, 1, heads, D]

        Args:
            most: Keys of the block of the plan that has the most of them.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [1, heads, q or k, D]
        window = self.window if self.window is not None and self.window < len(key) else None
        # Of torch's kernels on a GPU none takes a mask together with grouped queries and keeps its memory bounded.
        masked_on_gpu = query.is_cuda and len(query) != len(key)
        if self.softcap is not None or window is not None or masked_on_gpu:
            found = StripAttention.apply(q, k, v, self.scale, self.softcap, window)  # type: ignore[no-untyped-call]
        elif len(query) == len(key):
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        else:
            found = masked_attention(q, k, v, self.scale, most)
        return found.permute(2, 0, 1, 3)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return {}


def keys_and_values(key: Tensor, value: Tensor, rows: Tensor, context_group: Any) -> tuple[Tensor, Tensor]:
    """The keys and values of the blocks of a plan, one block after another. [t, 1, G, D] each -> [K, 1, G, D] each.

    Args:
        rows: Rows of the keys among those of all context-parallel ranks. [K] int64.
        context_group: Context-parallel process group; None without context parallelism.
    """
    if context_group is None:
        return key.index_select(0, rows), value.index_select(0, rows)
    both = torch.cat([key, value], dim=2)  # gathered together
    # In backward the gradients that all ranks' queries give are summed; see context.py.
    both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=context_group)
    # Two slices would each fill a gradient of the whole with zeros in backward, and split joins both gradients once.
    keys, values = both.index_select(0, rows).split(key.size(2), dim=2)
    return keys, values


def masked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, most: int) -> Tensor:
    """Attention of a block with more keys than queries, MASKED_ROWS queries at a time, so that the mask stays small.

    [1, heads, q, D] and twice [1, G, k, D] -> [1, heads, q, D]. Queries, keys and values carry gradient.

    Args:
        most: A mask is kept that serves blocks of up to as many keys.
    """
    queries, keys = query.size(2), key.size(2)
    middle = round_up(most, MASK_MULTIPLE)
    mask = _mask(middle, query.dtype, query.device)
    found = []
    for first in range(0, queries, MASKED_ROWS):
        last = min(first + MASKED_ROWS, queries)
        rows, seen = last - first, keys - queries + last
        # Row 0 of the mask sees the columns up to `middle`. From these columns on it sees the keys before the strip.
        part = mask[:rows, middle - (seen - rows) : middle + rows]
        found.append(
            F.scaled_dot_product_attention(
                query[:, :, first:last], key[:, :, :seen], value[:, :, :seen], part, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(found, dim=2) if len(found) > 1 else found[0]  # without a copy of a single strip


@lru_cache(maxsize=1)
def _mask(most: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mask of which the masks of all blocks with up to `most` keys are parts, since they differ by a shift only.

    Returns:
        0 where row i sees column c, and −inf where c > most + i. [MASKED_ROWS, most + MASKED_ROWS].
    """
    mask = torch.full((MASKED_ROWS, most + MASKED_ROWS), -torch.inf, dtype=dtype, device=device)
    return mask.triu_(most + 1)


class StripAttention(torch.autograd.Function):
    """Attention of a block, some of its queries at a time, with a soft-cap and a window where there are such.

    [1, heads, q, D] and twice [1, G, k, D] -> [1, heads, q, D]. Queries, keys and values carry gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None, window: int | None
    ) -> Tensor:
        groups, before = key.size(1), key.size(2) - query.size(2)
        q = query.reshape(groups, -1, *query.shape[2:])
        output = torch.empty_like(q)
        normalisers = q.new_empty(q.shape[:3], dtype=torch.float32)
        for rows, columns in _strips(query, key, window):
            scores, _ = _scores(q[:, :, rows], key[0, :, columns], rows, columns, before, scale, cap, window)
            normaliser = scores.logsumexp(dim=-1)
            probabilities = scores.sub_(normaliser[..., None]).exp_()
            output[:, :, rows] = _times(probabilities.to(value.dtype), value[0, :, columns])
            normalisers[:, :, rows] = normaliser
        ctx.save_for_backward(query, key, value, output, normalisers)
        ctx.options = scale, cap, window
        return output.view(query.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normalisers = ctx.saved_tensors
        scale, cap, window = ctx.options
        before = key.size(2) - query.size(2)
        q, grad = query.reshape(output.shape), grad.reshape(output.shape)
        grad_query = torch.zeros_like(q)
        grad_key, grad_value = (torch.zeros(key.shape[1:], dtype=torch.float32, device=key.device) for _ in range(2))
        along = (grad.float() * output.float()).sum(dim=-1)
        for rows, columns in _strips(query, key, window):
            part = q[:, :, rows]
            scores, curved = _scores(part, key[0, :, columns], rows, columns, before, scale, cap, window)
            probabilities = scores.sub_(normalisers[:, :, rows, None]).exp_()
            of_rows = grad[:, :, rows]
            grad_value[:, columns] += _transposed_times(probabilities.to(value.dtype), of_rows).float()
            grad_scores = _times(of_rows, value[0, :, columns].transpose(1, 2)).float()
            grad_scores.sub_(along[:, :, rows, None]).mul_(probabilities)
            if curved is not None:
                grad_scores.mul_(curved.square_().neg_().add_(1))
            narrow = grad_scores.mul_(scale).to(q.dtype)
            grad_query[:, :, rows] = _times(narrow, key[0, :, columns])
            grad_key[:, columns] += _transposed_times(narrow, part).float()
        grads = grad_query.view(query.shape), grad_key[None].to(key.dtype), grad_value[None].to(value.dtype)
        return (*grads, None, None, None)


def _strips(query: Tensor, key: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Strips of queries, as large as the budget of scores allows, with the keys that their queries see."""
    heads, queries, keys = query.size(1), query.size(2), key.size(2)
    before, step = keys - queries, attention_rows(keys, heads, window)
    for first in range(0, queries, step):
        last = min(first + step, queries)
        yield slice(first, last), slice(max(0, before + first - window + 1) if window else 0, before + last)


def _scores(
    query: Tensor,
    key: Tensor,
    rows: slice,
    columns: slice,
    before: int,
    scale: float,
    cap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores of a strip, −inf where a query does not see a key, and tanh(s / cap) where there is a cap.

    [G, N, rows, D] and [G, columns, D] -> [G, N, rows, columns] fp32 each.

    Args:
        before: Keys of the block before the one that the first query sees as its own.
    """
    # In 16 bits a product is rounded to 16 bits, which is too coarse for a score.
    scores = _times(query.float() * scale, key.float().transpose(1, 2))
    curved = None
    if cap is not None:
        curved = torch.tanh(scores / cap)
        scores = curved * cap
    row = torch.arange(before + rows.start, before + rows.stop, device=query.device)[:, None]
    column = torch.arange(columns.start, columns.stop, device=query.device)
    hidden = column > row
    if window is not None:
        hidden |= column <= row - window
    return scores.masked_fill_(hidden, -torch.inf), curved


def _times(left: Tensor, right: Tensor) -> Tensor:
    """[G, N, m, n] times [G, n, k] -> [G, N, m, k]."""
    groups, heads, rows, _ = left.shape
    return torch.bmm(left.reshape(groups, heads * rows, -1), right).view(groups, heads, rows, -1)


def _transposed_times(left: Tensor, right: Tensor) -> Tensor:
    """The sum over query heads of leftᵀ times right: [G, N, m, n] and [G, N, m, k] -> [G, n, k]."""
    groups = left.size(0)
    return torch.bmm(left.reshape(groups, -1, left.size(-1)).transpose(1, 2), right.reshape(groups, -1, right.size(-1)))
