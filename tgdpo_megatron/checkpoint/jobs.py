"""What a process of a conversion does: the parts of a model, from HuggingFace to Megatron and back.

Nothing here loads Megatron, so that a process is there in a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgdpo_megatron.checkpoint.failures import readable
from tgdpo_megatron.checkpoint.fingerprint import all_finite, tensor_sum
from tgdpo_megatron.checkpoint.index import Index
from tgdpo_megatron.checkpoint.reading import read_rows
from tgdpo_megatron.checkpoint.safetensors import HfShards, HfWeights
from tgdpo_megatron.checkpoint.torch_dist import write_blocks
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.tensor_maps import Block

PART_ELEMENTS = 128 * 1000**2
"""Elements of a part: what is written before the journal notes it. An interrupted conversion loses no more."""
Part = list[Block]


def in_parts(blocks: Iterable[Block]) -> list[Part]:
    """Blocks put together to parts of about equal size."""
    parts: list[Part] = [[]]
    filled = 0
    for block in blocks:
        elements = torch.Size(block.tensor.shape).numel()
        if parts[-1] and filled + elements > PART_ELEMENTS:
            parts.append([])
            filled = 0
        parts[-1].append(block)
        filled += elements
    return parts


@dataclass
class Sums:
    """Fingerprint sums of tensors, of the exact values and of those rounded to bf16."""

    exact: dict[str, int] = field(default_factory=dict)
    bf16: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, block: Tensor, first: int) -> None:
        """Add the rows of a tensor that begin at row `first`."""
        offset = [first, 0]
        exact = tensor_sum(block, offset=offset)
        # A number that bf16 holds is not rounded.
        rounded = (
            exact if block.dtype == torch.bfloat16 else tensor_sum(block, offset=offset, rounded_to=torch.bfloat16)
        )
        self.exact[key] = self.exact.get(key, 0) + exact
        self.bf16[key] = self.bf16.get(key, 0) + rounded

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> Sums:
        """The sums of all parts, from what the journal keeps of each."""
        total = cls()
        for record in records:
            for ours, part in ((total.exact, record["exact"]), (total.bf16, record["bf16"])):
                for key, value in part.items():
                    ours[key] = ours.get(key, 0) + value
        return total


@dataclass(frozen=True)
class ToMegatron:
    """From safetensors to .distcp files, one for each part.

    Attributes:
        dtypes: Of the Megatron tensors, by key.
        shapes: Of the whole Megatron tensors, by key.
        folder: Where the files are written.
        layers: As for torch_dist.box_of.
    """

    parts: Sequence[Part]
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    weights: HfWeights
    folder: Path
    layers: int | None = None

    def write(self, part: int) -> dict[str, Any]:
        """Write one part; returns its sums, and where its blocks lie.

        Raises:
            UserError: A file that cannot be read, or a weight that is not finite.
        """
        sums = Sums()

        def read(block: Block) -> Tensor:
            tensor, weights = block.tensor, self.weights
            pieces = [
                weights.rows(name, first, shape[0])
                for name, first, shape in zip(tensor.names, block.firsts, tensor.shapes, strict=True)
            ]
            whole = tensor.join(pieces).to(self.dtypes[tensor.key]).contiguous()
            if not all_finite(whole):
                raise UserError(f"{weights.folder}: {' or '.join(tensor.names)} holds numbers that are not finite.")
            sums.add(tensor.key, whole, block.first)
            return whole

        stored = write_blocks(self.folder, part, self.parts[part], self.dtypes, self.shapes, read, self.layers)
        return {"exact": sums.exact, "bf16": sums.bf16, "stored": stored}


@dataclass(frozen=True)
class ToHuggingFace:
    """From a Megatron checkpoint to safetensors files that HfShards.begin has made.

    Attributes:
        index: The checkpoint's.
        source: The checkpoint.
        weights: The folder of its .distcp files.
        folder: Where the files are.
    """

    parts: Sequence[Part]
    index: Index
    shards: HfShards
    source: Path
    weights: Path
    folder: Path

    def write(self, part: int) -> dict[str, Any]:
        """Write one part; returns its sums.

        Raises:
            UserError: A file that cannot be read, or a weight that is not finite.
        """
        sums, files = Sums(), set()
        for block in self.parts[part]:
            tensor = block.tensor
            with readable(f"{self.source}: {tensor.key}"):
                whole = read_rows(self.weights, self.index, tensor.key, block.first, tensor.shape)
            if not all_finite(whole):
                raise UserError(
                    f"{self.source}: {tensor.key} holds numbers that are not finite; the checkpoint is not exported."
                )
            sums.add(tensor.key, whole, block.first)
            for name, first, piece in zip(tensor.names, block.firsts, tensor.part(whole), strict=True):
                files.add(self.shards.write(self.folder, name, first, piece))
        for file in files:
            with (self.folder / file).open("rb") as written:
                os.fsync(written.fileno())
        return {"exact": sums.exact, "bf16": sums.bf16}
