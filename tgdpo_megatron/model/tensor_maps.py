"""How HuggingFace's tensors are joined to Megatron's tensors, and taken apart again.

A Megatron checkpoint has one key for each tensor of the whole model, at any parallel layout. Each entry joins one or
more HuggingFace tensors to one Megatron tensor. Joining and taking apart only move elements, so a round trip is
bit-exact. torch is imported only where tensors are joined, because the memory planner imports this file without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorMap:
    """One Megatron tensor and the HuggingFace tensors it is joined from.

    This base class is for a tensor that is the same in HuggingFace and in Megatron.

    Attributes:
        key: Megatron's checkpoint key.
        shape: Shape of the Megatron tensor, without vocabulary padding.
        names: Names of the HuggingFace tensors, in the order that `join` takes and `part` returns.
        shapes: Shapes of the HuggingFace tensors.
        split: Axis along which tensor-parallel ranks split the Megatron tensor; None where each has a full copy.
    """

    key: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: int | None

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The Megatron tensor."""
        return parts[0]

    def part(self, whole: Tensor) -> Sequence[Tensor]:
        """The HuggingFace tensors."""
        return [whole]

    def blocks(self, most: int) -> Iterator[Block]:
        """The tensor cut along its first axis, each block joined from rows of the HuggingFace tensors alone.

        Args:
            most: Rows of the Megatron tensor in a block; more only where fewer cannot be joined.
        """
        for first in range(0, self.shape[0], max(1, most)):
            shape = (min(max(1, most), self.shape[0] - first), *self.shape[1:])
            yield Block(replace(self, shape=shape, shapes=(shape,)), first, (first,))


@dataclass(frozen=True)
class Block:
    """Some rows of a Megatron tensor.

    Attributes:
        tensor: How these rows are joined and taken apart. Its shapes are those of the rows.
        first: Place of the first row in the Megatron tensor.
        firsts: Place of the first row in each of the HuggingFace tensors that `tensor` names.
    """

    tensor: TensorMap
    first: int
    firsts: tuple[int, ...]


class Stacked(TensorMap):
    """HuggingFace tensors one after another. Megatron splits each of them on its own over tensor-parallel ranks."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def part(self, whole: Tensor) -> Sequence[Tensor]:
        return whole.split([shape[0] for shape in self.shapes])

    def blocks(self, most: int) -> Iterator[Block]:
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            for block in same(self.key, name, shape).blocks(most):
                yield Block(block.tensor, start + block.first, block.firsts)
            start += shape[0]


@dataclass(frozen=True)
class ByGroup(TensorMap):
    """HuggingFace tensors interleaved: for each of `groups`, its rows of the first tensor, then of the second, …"""

    groups: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        columns = self.shape[1:]
        by_group = [part.reshape(self.groups, -1, *columns) for part in parts]
        return torch.cat(by_group, dim=1).reshape(-1, *columns)

    def part(self, whole: Tensor) -> Sequence[Tensor]:
        columns = self.shape[1:]
        rows = [shape[0] // self.groups for shape in self.shapes]
        by_group = whole.reshape(self.groups, -1, *columns).split(rows, dim=1)
        return [piece.reshape(-1, *columns) for piece in by_group]

    def blocks(self, most: int) -> Iterator[Block]:
        rows = [shape[0] // self.groups for shape in self.shapes]  # of one group
        step = max(1, most // sum(rows))
        for first in range(0, self.groups, step):
            groups = min(step, self.groups - first)
            shapes = tuple((groups * count, *self.shape[1:]) for count in rows)
            tensor = replace(self, shape=(groups * sum(rows), *self.shape[1:]), shapes=shapes, groups=groups)
            yield Block(tensor, first * sum(rows), tuple(first * count for count in rows))


def same(key: str, name: str, shape: tuple[int, ...], *, split: int | None = None) -> TensorMap:
    """One tensor that is the same in HuggingFace and in Megatron."""
    return TensorMap(key, shape, (name,), (shape,), split)


def stacked(key: str, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> TensorMap:
    """Tensors one after another along their first axis, which is split."""
    return Stacked(key, (sum(shape[0] for shape in shapes), *shapes[0][1:]), names, shapes, 0)


def by_group(key: str, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], *, groups: int) -> TensorMap:
    """Tensors interleaved group by group along their first axis, which is split."""
    return ByGroup(key, (sum(shape[0] for shape in shapes), *shapes[0][1:]), names, shapes, 0, groups)
