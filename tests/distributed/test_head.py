"""The distributed head against float64 and against Megatron, on 1, 2 and 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.program import run_ranks

CASES = [
    {"vocab_size": 100, "sequence_parallel": False, "models": 1, "tile": 1 << 22},  # later ranks hold padding alone
    {"vocab_size": 310, "sequence_parallel": False, "models": 3, "tile": 1},  # tiles of 128, 128 and 54 columns
    {"vocab_size": 320, "sequence_parallel": True, "models": 3, "tile": 1 << 22},  # one tile, no padding
    {"vocab_size": 310, "sequence_parallel": True, "models": 1, "tile": 1, "main_grad": True},
    {"vocab_size": 310, "sequence_parallel": False, "models": 2, "tile": 1 << 22, "main_grad": True},
    {"vocab_size": 310, "sequence_parallel": True, "models": 2, "tile": 1, "softcap": 2.0},
    {"vocab_size": 310, "sequence_parallel": False, "models": 3, "tile": 1 << 22, "softcap": 2.0, "main_grad": True},
    *(
        {
            "vocab_size": 310,
            "sequence_parallel": False,
            "models": 2,
            "tile": tile,
            "main_grad": True,
            "dtype": "bfloat16",
        }
        for tile in (1, 1 << 22)
    ),
]


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"TP{size}")
def errors(request: Any) -> list[dict[str, float]]:
    size = request.param
    # The vocabulary grows with the ranks, but for the first case.
    cases = [CASES[0], *({**case, "vocab_size": case["vocab_size"] + 320 * (size - 1)} for case in CASES[1:])]
    cases = [case if size > 1 else {**case, "sequence_parallel": False} for case in cases]
    found: list[dict[str, float]] = run_ranks("tests.support.head", "compare", size, cases=cases)
    for case in found:
        case["size"] = size
    return found


@pytest.mark.parametrize("kind", ["logps", "hidden gradient", "weight gradient", "against Megatron"])
def test_head_is_exact_under_arbitrary_upstream_gradients(errors: list[dict[str, float]], kind: str) -> None:
    exact = [case[kind] for case, made in zip(errors, CASES, strict=True) if "dtype" not in made]
    assert exact == pytest.approx([0.0] * len(exact), abs=5e-6)


@pytest.mark.parametrize(("kind", "limit"), [("logps", 0.04), ("hidden gradient", 0.04), ("weight gradient", 0.04)])
def test_head_in_bf16_is_off_by_the_rounding_of_its_products(
    errors: list[dict[str, float]], kind: str, limit: float
) -> None:
    """Logits of size up to 8 have bf16 steps of 2^-5 = 0.03; gradients are of size 1, with steps of 2^-8, summed up."""
    rounded = [case[kind] for case, made in zip(errors, CASES, strict=True) if "dtype" in made]
    assert len(rounded) == 2 and 0 < max(rounded) <= limit


def test_frozen_models_get_no_gradient(errors: list[dict[str, float]]) -> None:
    assert all(case["frozen gradients"] == 0 for case in errors)


def test_one_max_and_one_sum_serve_all_models_and_one_sum_their_divergence(errors: list[dict[str, float]]) -> None:
    expected = [(3 if case["models"] > 1 else 2) if errors[0]["size"] > 1 else 0 for case in CASES]
    assert [case["all-reduces"] for case in errors] == expected
