"""How many floating-point operations some work takes, counted by torch while it runs.

Matrix products and attention alone, a multiply-add counting 2: norms, exponentials and the optimizer's element by
element work are not counted. Causal attention counts what torch's kernel for CPUs computes, which is more than the half
that is needed. With a mask it computes all that it is given, and our attention gives it the keys that some queries see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from tgdpo_megatron.config.constants import MASKED_ROWS

aten: Any = torch.ops.aten
Shape = tuple[int, ...]

KEY_BLOCK = 512
"""Keys that torch's attention for CPUs takes at a time. Causal attention skips whole blocks alone: up to this length it
takes as long as attention without a mask, and over two blocks 3/4 as long."""


def counted_flops(work: Callable[..., Any], *arguments: Any) -> int:
    """Operations of some work, with those of backward if it goes backward."""
    with FlopCounterMode(display=False) as counter:
        work(*arguments)
    return counter.get_total_flops()


def causal_scores(length: int) -> int:
    """How many query-key products torch's causal attention for CPUs computes, of the `length`² of a full square."""
    blocks = range(0, length, KEY_BLOCK)
    return sum((min(first + KEY_BLOCK, length) - first) * min(first + KEY_BLOCK, length) for first in blocks)


def masked_scores(queries: int, keys: int) -> int:
    """The same for a block with more keys than queries: each strip of queries up to the last key that it sees."""
    strips = range(0, queries, MASKED_ROWS)
    return sum(
        (last - first) * (keys - queries + last) for first in strips for last in [min(first + MASKED_ROWS, queries)]
    )


# What torch does not count by itself: adding a product in place, and its attention for CPUs.


@register_flop_formula(aten.addmm_)
def _add_product(total: Shape, left: Shape, right: Shape, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention(query: Shape, key: Shape, value: Shape, dropout: float = 0, causal: bool = False, **_: Any) -> int:
    """Two products: queries by keys, weights by values."""
    batch, heads, length, channels = query
    scores = causal_scores(length) if causal else length * key[2]
    return 2 * 2 * batch * heads * scores * channels


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward(
    grad: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    out: Shape,
    logsumexp: Shape,
    dropout: float,
    causal: bool,
    **_: Any,
) -> int:
    """Five products: the weights again, and the gradients of the four factors."""
    forward: int = _attention(query, key, value, dropout, causal)
    return forward * 5 // 2
