"""Emulated FP8 against rounding worked out in float64 from the formats' definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.fp8.emulation import (
    BLOCK,
    E4M3,
    E5M2,
    RECIPES,
    Blockwise,
    Delayed,
    Fp8Product,
    Rounding,
    Tensorwise,
    rounded,
    scale_for,
)

# Mantissa bits, smallest exponent of a normal number, largest number: OCP's definitions of both formats.
FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}


def nearest(value: float, dtype: torch.dtype) -> float:
    """The nearest number of a format, ties to the even mantissa, the largest where there is none; in float64."""
    bits, smallest, largest = FORMATS[dtype]
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(value)[1] - 1, smallest) - bits)  # between neighbours, at this size
    return math.copysign(min(abs(round(value / step) * step), largest), value)


def nearest_of_each(numbers: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    values = [nearest(value * scale, dtype) / scale for value in numbers.double().flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(numbers.shape)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Of many sizes: log-normal over six decades, of both signs."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.choice([-1, 1], shape) * np.exp(rng.normal(0, 3, shape))).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 64.0])
def test_rounding_is_that_of_the_format(dtype: torch.dtype, scale: float) -> None:
    """Ties, subnormals, zeros and what is too large among them."""
    _, smallest, largest = FORMATS[dtype]
    special = [0.0, 1.0625, 1.1875, 1.125, 1.375, largest, 1.04 * largest, 2e6, 1e-9]
    special += [2.0**smallest * fraction for fraction in (1, 0.5, 0.4375, 0.0625, 0.1875)]
    values = torch.cat([torch.tensor(special) / scale, -torch.tensor(special) / scale, numbers(4000).float()])
    assert torch.equal(rounded(values, dtype, torch.tensor(scale)).double(), nearest_of_each(values, dtype, scale))


@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
def test_the_largest_number_of_a_tensor_becomes_the_largest_of_the_format(dtype: torch.dtype) -> None:
    largest = FORMATS[dtype][2]
    assert scale_for(torch.tensor(7.0), dtype).item() == pytest.approx(largest / 7, rel=1e-7)
    assert scale_for(torch.tensor(7.0), dtype, power_of_two=True).item() == 2.0 ** math.floor(math.log2(largest / 7))
    for nothing in (0.0, math.inf, math.nan):
        assert scale_for(torch.tensor(nothing), dtype).item() == 1.0
    assert math.isfinite(scale_for(torch.tensor(1e-44), dtype).item())


@pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
def test_tensorwise_rounds_at_the_scale_of_the_tensor(dtype: torch.dtype) -> None:
    values = numbers(30, 50)
    scale = FORMATS[dtype][2] / values.abs().max().double().item()
    rows, columns = Tensorwise(dtype)(values, learns=True)
    torch.testing.assert_close(rows.double(), nearest_of_each(values, dtype, scale), rtol=3e-7, atol=0)
    assert torch.equal(rows, columns)


def test_delayed_rounds_at_the_scale_of_the_training_pass_before() -> None:
    passes = [numbers(20, 20, seed=seed) * factor for seed, factor in enumerate([1, 0.01, 100])]
    rounding = Delayed(E4M3, length=1)
    scale = 1.0
    for values in passes:
        rows, _ = rounding(values, learns=True)
        torch.testing.assert_close(rows.double(), nearest_of_each(values, E4M3, scale), rtol=3e-7, atol=0)
        scale = 448 / values.abs().max().double().item()
    rounding(torch.zeros(2, 2), learns=True)
    assert rounding.scale.item() == pytest.approx(scale, rel=1e-6), "zeros tell nothing of the scale"


def test_delayed_with_a_longer_history_takes_its_largest_number() -> None:
    rounding = Delayed(E4M3, length=2)
    scales = []
    for largest in (4.0, 2.0, 1.0):
        rounding(torch.full((2, 2), largest), learns=True)
        scales.append(rounding.scale.item())
    assert scales == [448 / 4, 448 / 4, 448 / 2]


def test_delayed_learns_no_scale_where_no_gradient_is_recorded() -> None:
    rounding = Delayed(E4M3)
    for _ in range(3):
        rounding(torch.full((2, 2), 8.0), learns=False)
    assert rounding.scale.item() == 1.0
    rounding(torch.full((2, 2), 2.0), learns=True)
    assert rounding.scale.item() == 448 / 8, "what was seen before counts once a training pass comes"


@pytest.mark.parametrize("shape", [(5, 300), (260, 130), (16, 128)])
def test_blockwise_rounds_each_block_at_its_own_power_of_two(shape: tuple[int, int]) -> None:
    values = numbers(*shape)

    def in_blocks(matrix: Tensor, height: int) -> Tensor:
        found = torch.empty(matrix.shape, dtype=torch.float64)
        for top in range(0, matrix.shape[0], height):
            for left in range(0, matrix.shape[1], BLOCK):
                block = matrix[top : top + height, left : left + BLOCK]
                scale = 2.0 ** math.floor(math.log2(448 / block.abs().max().double().item()))
                found[top : top + height, left : left + BLOCK] = nearest_of_each(block, E4M3, scale)
        return found

    rows, columns = Blockwise(E4M3)(values, learns=True)
    assert torch.equal(rows.double(), in_blocks(values, 1))
    assert torch.equal(columns.double(), in_blocks(values.T, 1).T)
    for both in Blockwise(E4M3, square=True)(values, learns=True):
        assert torch.equal(both.double(), in_blocks(values, BLOCK))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_products_are_those_of_the_rounded_operands(recipe: str) -> None:
    """Against float64 products of what each operand's own rounding gives, which the tests above check."""
    generator = torch.Generator().manual_seed(1)
    activation, weight, gradient = (
        torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in ((40, 1, 160), (24, 160), (40, 1, 24))
    )
    apart = RECIPES[recipe]()

    def round_by(rounding: Rounding, values: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = rounding(values.flatten(0, -2), learns=True)
        return rows.double(), columns.double()

    (x, x_columns), (w, _), (g, g_columns) = (
        round_by(apart.activation, activation),
        round_by(apart.weight, weight),
        round_by(apart.gradient, gradient),
    )
    leaves = activation.clone().requires_grad_(), weight.clone().requires_grad_()
    output = Fp8Product.apply(*leaves, RECIPES[recipe](), True)  # type: ignore[no-untyped-call]
    output.backward(gradient)
    expected = {
        "output": (output, x @ w.T),
        "activation": (leaves[0].grad, g @ w),
        "weight": (leaves[1].grad, g_columns.T @ x_columns),
    }
    for found, right in expected.values():
        assert found is not None and found.dtype == torch.bfloat16
        # One rounding to bf16, 2⁻⁹, and fp32 sums whose terms may cancel.
        torch.testing.assert_close(found.double().flatten(), right.flatten(), rtol=2**-8, atol=1e-4)
