"""How HuggingFace's tensors make Megatron's, and back.

Megatron keys are global: one per logical tensor, whatever the layout. Each entry joins one or more HuggingFace tensors;
joining and parting only move elements, so a round trip is bit-exact. torch is imported where tensors are joined: the
memory planner reads the lists of tensors without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorMap:
    """One Megatron tensor and the HuggingFace tensors it is joined from; as it stands, a single equal one.

    Attributes:
        key: Megatron's checkpoint key.
        shape: Shape of the Megatron tensor, without vocabulary padding.
        names: HuggingFace names, in the order `join` takes and `part` returns.
        shapes: Their shapes.
    """

    key: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The Megatron tensor."""
        return parts[0]

    def part(self, whole: Tensor) -> Sequence[Tensor]:
        """The HuggingFace tensors."""
        return [whole]


class Stacked(TensorMap):
    """HuggingFace's tensors one after another. Megatron cuts each on its own over tensor-parallel ranks."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(parts))

    def part(self, whole: Tensor) -> Sequence[Tensor]:
        return whole.split([shape[0] for shape in self.shapes])


@dataclass(frozen=True)
class ByGroup(TensorMap):
    """HuggingFace's tensors interleaved: for each of `groups` the rows of the first, then those of the second, …"""

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


def same(key: str, name: str, shape: tuple[int, ...]) -> TensorMap:
    """One tensor that is the same on both sides."""
    return TensorMap(key, shape, (name,), (shape,))


def stacked(key: str, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> TensorMap:
    """Tensors one after another, along their first axis."""
    return Stacked(key, (sum(shape[0] for shape in shapes), *shapes[0][1:]), names, shapes)


def by_group(key: str, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], *, groups: int) -> TensorMap:
    """Tensors interleaved group by group, along their first axis."""
    return ByGroup(key, (sum(shape[0] for shape in shapes), *shapes[0][1:]), names, shapes, groups)
