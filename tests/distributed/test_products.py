"""Matrix products whose fp32 sums are kept, and the head that is made of them, on a pretended GPU.

The pretence has a torch that gives the sums, and one that does not; elsewhere than on a GPU there is neither.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.support.program import run_ranks

PROGRAM = "tests.support.cuda_dry_run"
on_a_pretended_gpu = partial(run_ranks, PROGRAM, world_size=1, program=PROGRAM)
BF16_STEP = 2**-8
"""Half of the distance between two bf16 numbers, relative to the lower."""
FP32_SUMS = 1e-6
"""A few fp32 roundings of 2^-24, relative to the largest sum."""

HEADS = [
    {"vocab_size": 310, "sequence_parallel": False, "models": models, "tile": tile, "dtype": "bfloat16"} | more
    for models in (1, 2)
    for tile in (1, 1 << 22)  # tiles of 128, 128 and 54 columns; one tile
    for more in ({"main_grad": True}, {"softcap": 2.0})
]


@pytest.fixture(scope="module", params=[True, False], ids=["sums kept", "older torch"])
def kept(request: Any) -> bool:
    kept: bool = request.param
    return kept


@pytest.fixture(scope="module")
def products(kept: bool) -> dict[str, Any]:
    found: dict[str, Any] = on_a_pretended_gpu("products", keeps_sums=kept)
    return found


@pytest.fixture(scope="module")
def heads(kept: bool) -> list[dict[str, float]]:
    found: list[dict[str, float]] = on_a_pretended_gpu("heads", cases=HEADS, keeps_sums=kept)
    return found


def test_sums_of_bf16_products_are_fp32_where_torch_gives_them(products: dict[str, Any], kept: bool) -> None:
    bf16 = products["torch.bfloat16"]
    assert bf16["dtype"] == ("torch.float32" if kept else "torch.bfloat16")
    for error in (bf16["error"], bf16["added"]):
        assert 0 < error <= FP32_SUMS if kept else FP32_SUMS < error <= BF16_STEP


def test_products_of_fp32_matrices_stay_fp32(products: dict[str, Any]) -> None:
    fp32 = products["torch.float32"]
    assert fp32["dtype"] == "torch.float32"
    assert 0 < max(fp32["error"], fp32["added"]) <= FP32_SUMS


def test_torch_is_asked_once(products: dict[str, Any]) -> None:
    """Two products were made, and one asked."""
    assert products["products"] == 3


def test_log_probs_and_divergence_of_a_bf16_model_are_fp32_where_sums_are_kept(
    heads: list[dict[str, float]], kept: bool
) -> None:
    """Logits are of size up to 8, whose bf16 steps are 2^-5 = 0.03; with the cap, of size 2, with steps of 0.008."""
    for case, made in zip(heads, HEADS, strict=True):
        assert 0 < case["logps"] <= (5e-6 if kept else 0.04), made
        assert case["logps"] > (0 if kept else 1e-4), made


def test_gradients_of_a_bf16_model_are_off_by_the_rounding_of_what_is_multiplied(
    heads: list[dict[str, float]],
) -> None:
    for case in heads:
        assert 0 < max(case["hidden gradient"], case["weight gradient"]) <= 0.04


def test_kept_sums_bring_gradients_no_further_from_exact_ones(request: pytest.FixtureRequest) -> None:
    """Of hidden states and weights, summed over all cases: what is rounded less often is closer."""
    both = [on_a_pretended_gpu("heads", cases=HEADS, keeps_sums=kept) for kept in (True, False)]
    for kind in ("hidden gradient", "weight gradient"):
        closer, further = (sum(case[kind] for case in found) for found in both)
        assert closer < further, kind


@pytest.mark.parametrize(("keeps_sums", "forward"), [(True, 4), (False, 6)])
def test_the_head_holds_as_many_bytes_a_logit_as_the_planner_counts(keeps_sums: bool, forward: int) -> None:
    """Forward 4 where sums are kept. Backward 6: probabilities in fp32 and rounded. All else is under a hundredth."""
    labelled, hidden, vocabulary = 512, 16, 8192
    found = on_a_pretended_gpu(
        "head_bytes", keeps_sums=keeps_sums, labelled=labelled, hidden=hidden, vocabulary=vocabulary
    )
    assert [peak / labelled / vocabulary for peak in found] == pytest.approx([forward, 6], rel=0.01)


def test_a_product_takes_four_bytes_before_it_is_added_to_the_weights_gradient() -> None:
    """With few labels beside wide states: of probabilities, rounded, 2 bytes a logit, and the product of [V, H]."""
    labelled, hidden, vocabulary = 64, 512, 4096
    _, backward = on_a_pretended_gpu(
        "head_bytes", keeps_sums=True, labelled=labelled, hidden=hidden, vocabulary=vocabulary
    )
    assert backward == pytest.approx(2 * labelled * vocabulary + 4 * vocabulary * hidden, rel=0.05)
