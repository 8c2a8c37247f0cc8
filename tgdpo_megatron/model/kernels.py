"""Kernels that compute attention by a plan in one call on a GPU, chosen at the start of a program by trying them.

A block of a plan may have more keys than queries, and its mask is aligned at the bottom right. Kernels of older
versions align it at the top left, and give wrong numbers without an error. So each candidate first computes a small
plan, and is taken only if its numbers are right.

Legend: t queries and K keys of all blocks, D channels of a head.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tgdpo_megatron.config.constants import round_up
from tgdpo_megatron.data.attention_plan import AttentionPlan
from tgdpo_megatron.errors import in_short


class Kernel(Protocol):
    """A kernel for blocks of queries and keys, made for one number of heads."""

    def __init__(self, heads: int, groups: int, channels: int, scale: float) -> None:
        """
        Args:
            heads, groups: Query heads and key-value heads of a rank.
            channels: Channels of a head.
            scale: What scores are multiplied by.
        """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """[t, heads, channels] and twice [K, groups, channels] -> [t, heads · channels]. All three carry gradient."""


class TransformerEngineKernel:
    """Transformer Engine's attention over packed sequences."""

    def __init__(self, heads: int, groups: int, channels: int, scale: float) -> None:
        from transformer_engine.pytorch import DotProductAttention

        self.attention = DotProductAttention(
            heads,
            channels,
            num_gqa_groups=groups,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            softmax_scale=scale,
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        found: Tensor = self.attention(
            query,
            key.contiguous(),
            value.contiguous(),
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_kv=plan.cu_seqlens_kv,
            # Upper bounds that cuDNN before 9.7 takes: multiples of 64.
            max_seqlen_q=round_up(plan.most_queries, 64),
            max_seqlen_kv=round_up(plan.most_keys, 64),
        )
        return found


class TorchKernel:
    """torch's attention over packed sequences. Grouped queries need torch 2.12; trying shows whether an
    older one does without."""

    def __init__(self, heads: int, groups: int, channels: int, scale: float) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self.attention, self.scale = varlen_attn, scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        # Named only where it is needed: an older torch does not know it.
        grouped: dict[str, Any] = {"enable_gqa": True} if query.size(1) != key.size(1) else {}
        found: Any = self.attention(
            query,
            key,
            value,
            plan.cu_seqlens_q,
            plan.cu_seqlens_kv,
            plan.most_queries,
            plan.most_keys,
            scale=self.scale,
            window_size=(-1, 0),
            **grouped,
        )
        output: Tensor = found.flatten(1)
        return output


CANDIDATES: dict[str, type[Kernel]] = {"Transformer Engine": TransformerEngineKernel, "torch": TorchKernel}


@cache
def find_kernel(heads: int, groups: int, channels: int, device: torch.device) -> tuple[type[Kernel] | None, str]:
    """The first candidate that computes a small plan rightly in bf16; and why the candidates before it do not.

    Args:
        heads, groups: Query heads and key-value heads of a rank.
        channels: Channels of a head.

    Returns:
        The kernel, or None where there is none, and the faults of those that were tried, by name.
    """
    faults: list[str] = []
    for name, candidate in CANDIDATES.items():
        fault = why_not(candidate, heads, groups, channels, device)
        if fault is None:
            return candidate, "; ".join(faults)
        faults.append(f"{name}: {fault}")
    return None, "; ".join(faults)


def why_not(candidate: type[Kernel], heads: int, groups: int, channels: int, device: torch.device) -> str | None:
    """Why a kernel cannot be used; None if it can."""
    faults = (_fault(candidate, heads, groups, channels, plan, device) for plan in PLANS)
    return next(filter(None, faults), None)


PLANS = ((3, 2), (3, 5)), ((70, 2, 1), (70, 40, 33))
"""Queries of the blocks, and their keys, of the two plans that are tried. In the first the longest block has more keys
than any has queries. In the second both numbers are 70, as where the longest block shares nothing. Kernels choose by
these two numbers how they compute."""
_SCALE = 0.3
"""What scores are multiplied by there: no kernel would take this number by itself."""


def _fault(
    candidate: type[Kernel],
    heads: int,
    groups: int,
    channels: int,
    blocks: tuple[tuple[int, ...], tuple[int, ...]],
    device: torch.device,
) -> str | None:
    """What is wrong with the numbers or gradients of a kernel for one plan; None if nothing is."""
    queries, keys = map(sum, blocks)
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (queries, heads, channels), "key": (keys, groups, channels), "value": (keys, groups, channels)}
    inputs = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
    plan = AttentionPlan.of(*blocks, np.arange(keys))
    moved = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    try:
        found = candidate(heads, groups, channels, _SCALE)(**moved, plan=plan.to(device)).float()
        gradients = torch.autograd.grad(found.square().sum(), list(moved.values()))
        results = [x.detach().float().cpu() for x in (found, *gradients)]
    except Exception as error:  # whatever it is: another kernel, or none, is taken
        return in_short(error)
    for top_left in (False, True):
        exact = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
        output = by_formula(**exact, plan=plan, scale=_SCALE, top_left=top_left)
        expected = [output.detach(), *torch.autograd.grad(output.square().sum(), list(exact.values()))]
        if all(_near(one, other) for one, other in zip(results, expected, strict=True)):
            return "it aligns the mask of fewer queries than keys at the top left" if top_left else None
    return "its numbers are wrong for fewer queries than keys"


def _near(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree but for the rounding of 16 bits. Another mask changes numbers by about their size."""
    return bool((found - expected).abs().max() < 0.05 * expected.abs().max())


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float, *, top_left: bool = False
) -> Tensor:
    """Attention by a plan as it is defined. [t, heads, D] and twice [K, groups, D] -> [t, heads · D].

    Args:
        top_left: Whether the first query sees the first key alone, which is wrong.
    """
    each = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(each, dim=1) for x in (key, value))
    found = []
    blocks = (query.split(plan.query_lengths), key.split(plan.key_lengths), value.split(plan.key_lengths))
    for q, k, v in zip(*blocks, strict=True):
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(0 if top_left else len(k) - len(q))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(found)
