"""What FP8 does to a linear layer, computed without a GPU: Transformer Engine's three recipes, emulated.

Operands are rounded to FP8 and back; products of the rounded numbers accumulate in fp32 and are rounded to the layer's
own dtype once. As in Transformer Engine 2.11 (common/recipe/__init__.py, pytorch/quantization.py, module/linear.py):

    tensorwise   Float8CurrentScaling: one scale a tensor, the format's largest number / the tensor's largest.
    delayed      DelayedScaling: one scale a tensor, from the largest number of the last 1,024 micro-batches, this one
                 not among them; 1 at first. Not updated where no gradient is recorded.
    delayed_1    The same with Megatron's own default, a history of one micro-batch.
    blockwise    Float8BlockScaling: one scale, a power of two, for each 128 numbers of an activation or gradient along
                 the axis that a product sums over, and for each 128 × 128 of a weight.

Activations and weights are E4M3. Gradients are E5M2 (`hybrid`), but E4M3 under `blockwise`, each recipe's default.

Not emulated: Hopper's FP8 accumulator, which keeps fewer than fp32's bits in the forward product of the two recipes
with a scale a tensor (Transformer Engine runs it without split accumulation); normalisation fused with rounding, which
skips one rounding to bf16; tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
_VALUES = {dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float() for dtype in (E4M3, E5M2)}
"""What each of a format's 256 codes stands for."""


def scale_for(largest: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """What numbers of up to this size are multiplied by before they are rounded. Same shape, fp32.

    Zeros and numbers that are not finite get 1.
    """
    scale = torch.finfo(dtype).max / largest.float()
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)  # rounded down
    return scale.where((largest > 0) & largest.isfinite(), 1.0)


def rounded(numbers: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """The nearest numbers that FP8 has at this scale, ties to even; what is too large becomes the largest. fp32."""
    largest = torch.finfo(dtype).max
    codes = (numbers.float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    # Looked up: torch's own way back takes a CPU five times as long.
    return _VALUES[dtype].index_select(0, codes.flatten().int()).view(codes.shape) * scale.reciprocal()


class Rounding(Protocol):
    """How one operand of one layer is rounded; may remember what it saw."""

    def __call__(self, numbers: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
        """A matrix rounded for a product that sums over its columns, and for one that sums over its rows. fp32.

        Args:
            learns: Whether a gradient is recorded: this pass is a training step's.
        """


@dataclass
class Tensorwise:
    """One scale, from the numbers themselves."""

    dtype: torch.dtype

    def __call__(self, numbers: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
        both = rounded(numbers, self.dtype, scale_for(numbers.abs().amax(), self.dtype))
        return both, both


@dataclass
class Delayed:
    """One scale, from the largest number of each of the last `length` training passes."""

    dtype: torch.dtype
    length: int = 1024
    scale: Tensor = field(default_factory=lambda: torch.ones(()))
    seen: Tensor = field(default_factory=lambda: torch.zeros(()))
    """The largest number since the last training pass."""
    history: Tensor = field(init=False)
    """The largest number of each training pass, newest first. [length]"""

    def __post_init__(self) -> None:
        self.history = torch.zeros(self.length)

    def __call__(self, numbers: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
        both = rounded(numbers, self.dtype, self.scale)
        self.seen = torch.maximum(self.seen, numbers.abs().amax().float())
        if learns:
            self.history = self.history.roll(1)
            self.history[0] = self.seen
            self.seen = torch.zeros(())
            largest = self.history.amax()
            self.scale = scale_for(largest, self.dtype).where(largest > 0, self.scale)
        return both, both


@dataclass
class Blockwise:
    """A scale for each 128 numbers along the axis summed over, or, `square`, for each 128 × 128."""

    dtype: torch.dtype
    square: bool = False

    def __call__(self, numbers: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
        if self.square:
            both = self._blocks(numbers, BLOCK)
            return both, both
        return self._blocks(numbers, 1), self._blocks(numbers.T, 1).T

    def _blocks(self, numbers: Tensor, rows: int) -> Tensor:
        height, width = numbers.shape
        filled = torch.nn.functional.pad(numbers, (0, -width % BLOCK, 0, -height % rows))
        blocks = filled.unflatten(1, (-1, BLOCK)).unflatten(
            0, (-1, rows)
        )  # [rows of blocks, rows, columns of them, 128]
        scale = scale_for(blocks.abs().amax(dim=(1, 3), keepdim=True), self.dtype, power_of_two=True)
        return rounded(blocks, self.dtype, scale).flatten(2).flatten(0, 1)[:height, :width]


@dataclass(frozen=True)
class Operands:
    """The roundings of one layer's three operands."""

    activation: Rounding
    weight: Rounding
    gradient: Rounding


RECIPES: dict[str, Callable[[], Operands]] = {
    "tensorwise": lambda: Operands(Tensorwise(E4M3), Tensorwise(E4M3), Tensorwise(E5M2)),
    "delayed": lambda: Operands(Delayed(E4M3), Delayed(E4M3), Delayed(E5M2)),
    "delayed_1": lambda: Operands(Delayed(E4M3, 1), Delayed(E4M3, 1), Delayed(E5M2, 1)),
    "blockwise": lambda: Operands(Blockwise(E4M3), Blockwise(E4M3, square=True), Blockwise(E4M3)),
}


class Fp8Product(torch.autograd.Function):
    """activation · weightᵀ with rounded operands, and its two backward products with a rounded gradient."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, weight: Tensor, operands: Operands, learns: bool) -> Tensor:
        """[..., in], [out, in] -> [..., out], in the activation's dtype."""
        rows, columns = operands.activation(activation.flatten(0, -2), learns=learns)
        matrix, _ = operands.weight(weight, learns=learns)
        ctx.save_for_backward(columns, matrix)
        ctx.operands = operands
        return (rows @ matrix.T).to(activation.dtype).view(*activation.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        activation, weight = ctx.saved_tensors
        rows, columns = ctx.operands.gradient(gradient.flatten(0, -2), learns=True)
        for_activation = (rows @ weight).to(gradient.dtype).view(*gradient.shape[:-1], -1)
        return for_activation, (columns.T @ activation).to(gradient.dtype), None, None


def emulate(model: Any, recipe: str | None) -> int:
    """Put a recipe under the linear layers of a model's transformer layers; None takes it away again.

    Embedding, output head, norms and attention stay as they are.

    Returns:
        The number of layers.
    """
    layers = [layer for layer in model.decoder.modules() if isinstance(layer, ColumnParallelLinear | RowParallelLinear)]
    assert layers and all(layer.tp_group.size() == 1 for layer in layers), "only layers that are whole are emulated"
    for layer in layers:
        layer.__dict__.pop("_forward_impl", None)
        if recipe is not None:
            layer._forward_impl = partial(_forward, RECIPES[recipe]())
    return len(layers)


def _forward(operands: Operands, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
    """Called as Megatron's parallel layers call their product."""
    assert bias is None
    return Fp8Product.apply(input, weight, operands, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
