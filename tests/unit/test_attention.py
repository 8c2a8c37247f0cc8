"""Attention in blocks of queries is attention: soft-caps, windows and grouped heads, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tgdpo_megatron.config import constants
from tgdpo_megatron.model.attention import BlockedAttention

TOKENS, GROUPS, PER_GROUP, CHANNELS = 23, 2, 3, 8
SCALE = 0.3


def written_out(query: Tensor, key: Tensor, value: Tensor, cap: float | None, window: int | None) -> Tensor:
    """Attention as the papers write it, over whole matrices."""
    key, value = (x.repeat_interleave(PER_GROUP, dim=1) for x in (key, value))
    scores = SCALE * query @ key.transpose(-1, -2)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    for row in range(TOKENS):
        for column in range(TOKENS):
            if column > row or (window is not None and column <= row - window):
                scores[..., row, column] = -math.inf
    return scores.softmax(dim=-1) @ value


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    heads = (GROUPS * PER_GROUP, GROUPS, GROUPS)
    return [torch.randn(1, of, TOKENS, CHANNELS, generator=generator, dtype=torch.float64) for of in heads]


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 5, TOKENS + 1])
@pytest.mark.parametrize("scores_at_once", [1, 6 * 23 * 4, 1 << 24])
def test_blocks_give_the_whole_matrix_and_its_gradient(
    cap: float | None, window: int | None, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one query, of some and of all. Scores are fp32, so the limit is that of fp32."""
    monkeypatch.setattr(constants, "ATTENTION_SCORES", scores_at_once)
    monkeypatch.setattr(constants, "_LEAST_ROWS", 4)
    exact = [x.requires_grad_() for x in inputs()]
    expected = written_out(*exact, cap, window)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (expected * weights).sum().backward()
    ours = [x.float().requires_grad_() for x in inputs()]
    found = BlockedAttention.apply(*ours, SCALE, cap, window)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-6)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=0, atol=1e-5)


def test_in_bf16_scores_are_not_rounded_to_bf16() -> None:
    """At a cap of 50 a score has steps of 0.25 in bf16; the result is as near as its own rounding."""
    query, key, value = (3 * x.bfloat16() for x in inputs())
    exact = written_out(query.double(), key.double(), value.double(), 50.0, None)
    found = BlockedAttention.apply(query, key, value, SCALE, 50.0, None)
    assert (found.double() - exact).abs().max() < 2**-7 * exact.abs().max()


def test_in_bf16_gradients_are_as_near_as_those_of_torchs_kernel() -> None:
    """Without a cap and a window torch computes the same; either is off by the rounding of its products."""
    from torch.nn.functional import scaled_dot_product_attention

    weights = torch.randn(1, GROUPS * PER_GROUP, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(5))
    exact = [x.bfloat16().double().requires_grad_() for x in inputs()]
    (written_out(*exact, None, None) * weights).sum().backward()
    errors = []
    for blocked in (True, False):
        narrow = [x.bfloat16().requires_grad_() for x in inputs()]
        if blocked:
            found = BlockedAttention.apply(*narrow, SCALE, None, None)
        else:
            found = scaled_dot_product_attention(*narrow, is_causal=True, scale=SCALE, enable_gqa=True)
        (found * weights).sum().backward()
        errors.append(max(float((x.grad - y.grad).abs().max()) for x, y in zip(narrow, exact, strict=True)))
    assert 0 < errors[0] < 2 * errors[1], errors


@pytest.mark.parametrize(
    ("tokens", "heads", "window"), [(8192, 4, 512), (32768, 4, 512), (8192, 8, 1024), (4096, 4, 16), (8192, 8, None)]
)
def test_a_block_keeps_to_its_budget_and_computes_few_scores_in_vain(
    tokens: int, heads: int, window: int | None
) -> None:
    """The sizes of Gemma-3-1B among them. With a window, a block has no more than twice the scores that are needed, or
    64 rows."""
    blocks = [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in _blocks(tokens, heads, window)]
    assert sum(rows for rows, _ in blocks) == tokens
    assert max(heads * rows * keys for rows, keys in blocks) <= constants.ATTENTION_SCORES
    if window is not None:
        assert all(keys <= max(2 * window, 64 + window) for _, keys in blocks)
