"""Matrix products on a CPU, against float64. tests/distributed/test_products.py has those of a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tgdpo_megatron.model.products import add_product, product


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def matrices(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((40, 300), (300, 50)))
    return left.to(request.param), right.to(request.param)


def tolerance(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A few fp32 roundings of the largest sum, and in bf16 the one rounding of each sum: half a step."""
    rounding = 2**-8 * exact.abs() if dtype == torch.bfloat16 else 0
    return rounding + 1e-6 * exact.abs().max()


def test_a_product_is_exact_to_fp32_and_rounded_once_where_it_is_bf16(matrices: tuple[Tensor, Tensor]) -> None:
    left, right = matrices
    exact = left.double() @ right.double()
    found = product(left, right)
    assert found.dtype == left.dtype
    assert ((found.double() - exact).abs() <= tolerance(exact, left.dtype)).all()


def test_a_product_is_added_to_what_is_there(matrices: tuple[Tensor, Tensor]) -> None:
    left, right = matrices
    exact = left.double() @ right.double()
    total = torch.full((40, 50), 3.0)
    add_product(total, left, right)
    assert ((total.double() - 3 - exact).abs() <= tolerance(exact, left.dtype)).all()


def test_a_cpu_is_never_asked_for_its_sums(matrices: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask makes a tensor on a GPU, which this machine may not have."""
    asked: list[torch.dtype] = []
    monkeypatch.setattr("tgdpo_megatron.model.products.keeps_sums", asked.append)
    product(*matrices)
    assert asked == []
