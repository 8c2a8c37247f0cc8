"""The distributed head's kernels on a GPU against float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.gpu_where import LOCAL, REHEARSAL, on_gpu
from tests.support.program import PROGRAM

CASES = [
    {"vocab_size": 310, "sequence_parallel": False, "models": models, "tile": tile, "main_grad": grad, "dtype": dtype}
    for dtype in ("float32", "bfloat16")
    for models, grad in ((1, False), (2, True))
    for tile in (1, 1 << 22)  # tiles of 128, 128 and 54 columns; one tile
]
KINDS = ("logps", "hidden gradient", "weight gradient")
# A CPU gives no fp32 sums of bf16 products: a rehearsal is on a device that is pretended to give them.
WHERE = "tests.support.cuda_dry_run" if REHEARSAL else PROGRAM


@pytest.fixture(scope="module")
def errors() -> list[dict[str, float]]:
    found: list[dict[str, float]] = on_gpu(
        "compare", layers=LOCAL, module="tests.support.head", program=WHERE, cases=CASES
    )
    return found


def of(errors: list[dict[str, float]], dtype: str, kind: str) -> list[float]:
    return [case[kind] for case, made in zip(errors, CASES, strict=True) if made["dtype"] == dtype]


@pytest.mark.parametrize("kind", [*KINDS, "against Megatron"])
def test_fp32_is_exact_under_random_upstream_gradients(errors: list[dict[str, float]], kind: str) -> None:
    """To a few units of fp32 in numbers of size 8: a GPU adds products up in another order than a CPU."""
    found = of(errors, "float32", kind)
    assert found == pytest.approx([0.0] * 4, abs=1e-5)


def test_log_probs_of_bf16_states_are_as_exact_as_those_of_fp32_ones(errors: list[dict[str, float]]) -> None:
    """The fp32 sums of bf16 products are kept; logits rounded to bf16 would be off by a hundred times as much."""
    found = of(errors, "bfloat16", "logps")
    assert found == pytest.approx([0.0] * 4, abs=1e-5)
    assert 100 * max(found) < min(of(errors, "bfloat16", "with rounded logits"))


@pytest.mark.parametrize("kind", ["hidden gradient", "weight gradient"])
def test_gradients_in_bf16_are_off_by_the_rounding_of_what_is_multiplied(
    errors: list[dict[str, float]], kind: str
) -> None:
    """Probabilities and upstream gradients are rounded to steps of 2^-8 before they are multiplied and summed up."""
    found = of(errors, "bfloat16", kind)
    assert 0 < max(found) <= 0.04


def test_frozen_models_get_no_gradient(errors: list[dict[str, Any]]) -> None:
    assert all(case["frozen gradients"] == 0 for case in errors)
