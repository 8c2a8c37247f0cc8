"""Attention in strips of queries is attention: soft-caps, windows and grouped heads, forward and backward; also where a
block has keys before its first query."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tgdpo_megatron.config import constants
from tgdpo_megatron.model import attention
from tgdpo_megatron.model.attention import StripAttention, _strips, masked_attention

TOKENS, GROUPS, PER_GROUP, CHANNELS = 23, 2, 3, 8
SCALE = 0.3


def written_out(query: Tensor, key: Tensor, value: Tensor, cap: float | None, window: int | None) -> Tensor:
    """Attention as the papers write it, over whole matrices. The last query sees the last key."""
    key, value = (x.repeat_interleave(PER_GROUP, dim=1) for x in (key, value))
    scores = SCALE * query @ key.transpose(-1, -2)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    before = key.size(2) - query.size(2)
    for row in range(query.size(2)):
        for column in range(key.size(2)):
            if column > before + row or (window is not None and column <= before + row - window):
                scores[..., row, column] = -math.inf
    return scores.softmax(dim=-1) @ value


def inputs(before: int = 0) -> list[Tensor]:
    """Queries, keys and values, with so many keys before that of the first query."""
    generator = torch.Generator().manual_seed(3)
    sizes = ((GROUPS * PER_GROUP, TOKENS), (GROUPS, before + TOKENS), (GROUPS, before + TOKENS))
    return [torch.randn(1, *size, CHANNELS, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("before", [0, 1, 40])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 5, TOKENS + 1])
@pytest.mark.parametrize("scores_at_once", [1, 6 * 23 * 4, 1 << 24])
def test_strips_give_the_whole_matrix_and_its_gradient(
    cap: float | None, window: int | None, scores_at_once: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips of one query, of some and of all. Scores are fp32, so the limit is that of fp32."""
    monkeypatch.setattr(constants, "ATTENTION_SCORES", scores_at_once)
    monkeypatch.setattr(constants, "_LEAST_ROWS", 4)
    exact = [x.requires_grad_() for x in inputs(before)]
    expected = written_out(*exact, cap, window)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (expected * weights).sum().backward()
    ours = [x.float().requires_grad_() for x in inputs(before)]
    found = StripAttention.apply(*ours, SCALE, cap, window)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-6)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=0, atol=1e-5)


@pytest.fixture
def narrow_masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Masks of five queries, so that the 23 here take five strips, the last of three."""
    monkeypatch.setattr(attention, "MASKED_ROWS", 5)
    attention._mask.cache_clear()
    yield
    attention._mask.cache_clear()


@pytest.mark.usefixtures("narrow_masks")
@pytest.mark.parametrize("before", [1, 4, 5, 40])
@pytest.mark.parametrize("most", [0, 2000])
def test_masked_strips_give_the_whole_matrix_and_its_gradient(before: int, most: int) -> None:
    """torch has no rule for queries that begin after the first key, so it is given parts of one mask. `most` is how
    many keys more than this block another block of the plan has."""
    exact = [x.requires_grad_() for x in inputs(before)]
    expected = written_out(*exact, None, None)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (expected * weights).sum().backward()
    ours = [x.float().requires_grad_() for x in inputs(before)]
    found = masked_attention(*ours, SCALE, before + TOKENS + most)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-6)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=0, atol=1e-5)


def test_a_mask_takes_no_memory_for_every_pair_of_tokens() -> None:
    """For a block of up to 32,768 keys: 256 rows of as many numbers and 256 more, and none for each of its queries."""
    attention._mask.cache_clear()
    mask = attention._mask(32768, torch.bfloat16, torch.device("cpu"))
    attention._mask.cache_clear()
    assert mask.numel() == 256 * (32768 + 256)


def test_in_bf16_scores_are_not_rounded_to_bf16() -> None:
    """At a cap of 50 a score has steps of 0.25 in bf16; the result is as near as its own rounding."""
    query, key, value = (3 * x.bfloat16() for x in inputs())
    exact = written_out(query.double(), key.double(), value.double(), 50.0, None)
    found = StripAttention.apply(query, key, value, SCALE, 50.0, None)
    assert (found.double() - exact).abs().max() < 2**-7 * exact.abs().max()


def test_in_bf16_gradients_are_as_near_as_those_of_torchs_kernel() -> None:
    """Without a cap and a window torch computes the same; either is off by the rounding of its products."""
    from torch.nn.functional import scaled_dot_product_attention

    weights = torch.randn(1, GROUPS * PER_GROUP, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(5))
    exact = [x.bfloat16().double().requires_grad_() for x in inputs()]
    (written_out(*exact, None, None) * weights).sum().backward()
    errors = []
    for in_strips in (True, False):
        narrow = [x.bfloat16().requires_grad_() for x in inputs()]
        if in_strips:
            found = StripAttention.apply(*narrow, SCALE, None, None)
        else:
            found = scaled_dot_product_attention(*narrow, is_causal=True, scale=SCALE, enable_gqa=True)
        (found * weights).sum().backward()
        errors.append(max(float((x.grad - y.grad).abs().max()) for x, y in zip(narrow, exact, strict=True)))
    assert 0 < errors[0] < 2 * errors[1], errors


@pytest.mark.parametrize(
    ("tokens", "heads", "window"), [(8192, 4, 512), (32768, 4, 512), (8192, 8, 1024), (4096, 4, 16), (8192, 8, None)]
)
def test_a_strip_keeps_to_its_budget_and_computes_few_scores_in_vain(
    tokens: int, heads: int, window: int | None
) -> None:
    """The sizes of Gemma-3-1B among them. With a window, a strip has no more than twice the scores that are needed, or
    64 rows."""
    query = torch.empty(1, heads, tokens, 0)
    strips = [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in _strips(query, query, window)]
    assert sum(rows for rows, _ in strips) == tokens
    assert max(heads * rows * keys for rows, keys in strips) <= constants.ATTENTION_SCORES
    if window is not None:
        assert all(keys <= max(2 * window, 64 + window) for _, keys in strips)


def test_keys_before_the_first_query_are_read_only_as_far_as_the_window_reaches() -> None:
    """4,096 queries that continue 4,096 keys, with a window of 512."""
    query, key = torch.empty(1, 4, 4096, 0), torch.empty(1, 4, 8192, 0)
    strips = list(_strips(query, key, 512))
    assert strips[0][1].start == 4096 - 511 and strips[-1][1].stop == 8192
    assert all(keys.stop == 4096 + rows.stop for rows, keys in strips)
    assert all(keys.start == 4096 + rows.start - 511 for rows, keys in strips)
