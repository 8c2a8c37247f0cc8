"""What the benchmark counts and places by itself, on cases known by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.rows import Row, paired
from bench.speed.flops import counted_flops
from bench.speed.picture import draw
from bench.speed.trace import idle_share


def forward_then_backward(micro_batches: int) -> list[tuple[str, int, int]]:
    return [(kind, 0, place) for kind in "FB" for place in range(micro_batches)]


def test_one_stage_is_never_idle() -> None:
    assert idle_share([forward_then_backward(4)]) == 0.0


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (2, 5), (4, 3)])
def test_all_forward_then_all_backward_idles_as_the_formula_says(stages: int, micro_batches: int) -> None:
    """GPipe's schedule has the bubble of 1F1B: (p − 1) / (m + p − 1)."""
    found = idle_share([forward_then_backward(micro_batches)] * stages)
    assert found == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_one_micro_batch_after_the_other_leaves_all_but_one_stage_idle() -> None:
    order = [event for place in range(4) for event in (("F", 0, place), ("B", 0, place))]
    assert idle_share([order] * 2) == pytest.approx(1 / 2)


def test_operations_of_a_product_and_of_its_gradients_are_counted() -> None:
    left, right = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    assert counted_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert counted_flops(lambda: (left @ right).sum().backward()) == 3 * 2 * 3 * 5 * 7
    total = torch.zeros(3, 7)
    assert counted_flops(lambda: total.addmm_(left.detach(), right.detach())) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("causal", [False, True])
def test_operations_of_attention_are_counted_and_half_of_them_if_causal(causal: bool) -> None:
    """Two heads of 8 channels, 16 tokens: two products of 16 × 16 × 8 a head; five more in backward."""
    q, k, v = (torch.ones(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 16 * 16 * 8 // (2 if causal else 1)
    assert counted_flops(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)) == 2 * product
    backward = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()  # noqa: E731
    assert counted_flops(backward) == 7 * product


def test_a_row_is_the_median_of_paired_ratios() -> None:
    row = paired("x", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0], target=2.5)
    assert row.measured == 2.0 and row.verdict == "pass" and row.note == "1.00–3.00 in 3 pairs"


def test_a_broken_or_missed_row_fails_and_a_skipped_one_does_not() -> None:
    assert Row("x", None, broke=True).verdict == "FAIL"
    assert Row("x", 1.1, target=1.0).verdict == "FAIL" and Row("x", 1.1, target=1.0, at_most=False).verdict == "pass"
    assert Row("x", None, note="no data").verdict == "skipped"


def test_the_picture_shows_every_row_with_a_target_and_every_others_step(tmp_path: Path) -> None:
    rows = [
        Row("TGDPO step, authors' / ours", 3.0, target=2.8, at_most=False),
        Row("DPO step, TRL live / ours live", 1.7),
        Row("cached / live", 0.61, target=0.63),
        Row("skipped", None),
    ]
    draw(rows, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    assert "3.00×" in text and "1.70×" in text and "0.61 (target ≤ 0.63)" in text and "skipped" not in text
