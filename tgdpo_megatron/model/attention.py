"""Causal attention within each segment of a micro-batch, with grouped queries, sliding windows and soft-caps.

Without a soft-cap, and where the window reaches past the segment, torch's scaled_dot_product_attention computes it.
Otherwise it is computed here, one block of queries at a time, because no kernel of torch has a soft-cap, and because a
mask would take memory for every pair of tokens:

    s = scale · q kᵀ,   c = cap · tanh(s / cap),   p = softmax(c),   o = p v
    ∂L/∂c = p (∂L/∂p − Σ ∂L/∂o · o),   ∂L/∂s = ∂L/∂c · (1 − tanh²(s / cap))

Backward computes the scores of a block again from queries and keys, and the probabilities from the log-sum-exps, which
forward keeps. Scores and probabilities are fp32.

Legend: t tokens of a segment, G key-value heads, P query heads of each, C channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from tgdpo_megatron.config.constants import attention_rows


class Segments(PackedSeqParams):  # type: ignore[misc]
    """Segment lengths, kept on the host so that attention can read them without waiting for the device."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__(qkv_format="sbhd")
        self.lengths = lengths


class SegmentAttention(MegatronModule):  # type: ignore[misc]
    """Megatron's core attention, over the segments of a micro-batch.

    Args:
        softcap: cap, which bounds the scores; None for no soft-cap.
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
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.softcap = softcap
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # Megatron counts the tokens before the query, and this class the query as well.
        self.window = config.window_size[0] + 1 if windowed else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> Tensor:
        """[T, 1, heads, channels] each (fewer heads in key and value) -> [T, 1, heads · channels]."""
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None
        tokens, batch = query.shape[:2]
        # Segments are split and joined along the first axis, the tokens, where a split needs no copy. With the heads
        # as the first axis, everything would be copied twice.
        segments = zip(*(x.split(packed_seq_params.lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*segment) for segment in segments]).reshape(tokens, batch, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention within one segment. [t, 1, heads, C] each -> [t, 1, heads, C]"""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [1, heads, t, C]
        window = self.window if self.window is not None and self.window < len(query) else None
        if self.softcap is None and window is None:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        else:
            found = BlockedAttention.apply(q, k, v, self.scale, self.softcap, window)  # type: ignore[no-untyped-call]
        return found.permute(2, 0, 1, 3)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return {}


class BlockedAttention(torch.autograd.Function):
    """Causal attention with a soft-cap and a window, one block of queries at a time.

    [1, heads, t, C] each (fewer heads in key and value) -> [1, heads, t, C]. Queries, keys and values carry gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None, window: int | None
    ) -> Tensor:
        groups, tokens = key.shape[1:3]
        q = query.reshape(groups, -1, tokens, query.size(-1))
        output = torch.empty_like(q)
        normalisers = q.new_empty(q.shape[:3], dtype=torch.float32)
        for rows, columns in _blocks(tokens, query.size(1), window):
            scores, _ = _scores(q[:, :, rows], key[0, :, columns], rows, columns, scale, cap, window)
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
        groups, tokens = key.shape[1:3]
        q, grad = query.reshape(output.shape), grad.reshape(output.shape)
        grad_query = torch.zeros_like(q)
        grad_key, grad_value = (torch.zeros(key.shape[1:], dtype=torch.float32, device=key.device) for _ in range(2))
        along = (grad.float() * output.float()).sum(dim=-1)
        for rows, columns in _blocks(tokens, query.size(1), window):
            part = q[:, :, rows]
            scores, curved = _scores(part, key[0, :, columns], rows, columns, scale, cap, window)
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


def _blocks(tokens: int, heads: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, as large as the budget of scores allows, with the keys that their queries see."""
    step = attention_rows(tokens, heads, window)
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        yield slice(first, last), slice(max(0, first - window + 1) if window else 0, last)


def _scores(
    query: Tensor, key: Tensor, rows: slice, columns: slice, scale: float, cap: float | None, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """Scores of a block, −inf where a query does not see a key, and tanh(s / cap) where there is a cap.

    [G, P, rows, C] and [G, columns, C] -> [G, P, rows, columns] fp32 each.
    """
    # In 16 bits a product is rounded to 16 bits, which is too coarse for a score.
    scores = _times(query.float() * scale, key.float().transpose(1, 2))
    curved = None
    if cap is not None:
        curved = torch.tanh(scores / cap)
        scores = curved * cap
    row = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
    column = torch.arange(columns.start, columns.stop, device=query.device)
    hidden = column > row
    if window is not None:
        hidden |= column <= row - window
    return scores.masked_fill_(hidden, -torch.inf), curved


def _times(left: Tensor, right: Tensor) -> Tensor:
    """[G, P, m, n] times [G, n, k] -> [G, P, m, k]."""
    groups, heads, rows, _ = left.shape
    return torch.bmm(left.reshape(groups, heads * rows, -1), right).view(groups, heads, rows, -1)


def _transposed_times(left: Tensor, right: Tensor) -> Tensor:
    """The sum over query heads of leftᵀ times right: [G, P, m, n] and [G, P, m, k] -> [G, n, k]."""
    groups = left.size(0)
    return torch.bmm(left.reshape(groups, -1, left.size(-1)).transpose(1, 2), right.reshape(groups, -1, right.size(-1)))
