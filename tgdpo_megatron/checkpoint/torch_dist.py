"""Megatron's checkpoint format, torch_dist, written some rows at a time, without a model or process group.

Every block of rows is a tensor of its own in a .distcp file. So a rank that needs a part of a tensor reads the blocks
that overlap it, and not the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from tgdpo_megatron.checkpoint.index import MAX_BLOCKS
from tgdpo_megatron.model.tensor_maps import Block

CONTENT_METADATA = {"non_homogeneous_layers": True}
"""Tells Megatron that every layer has keys of its own, and that layers are not stacked under one key."""

WrittenBlock = tuple[str, int, str, int, int]
"""Where a block lies, in JSON types: key, first row, file, first byte, bytes."""


def write_blocks(
    folder: Path,
    part: int,
    blocks: Sequence[Block],
    dtypes: dict[str, torch.dtype],
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[Block], Tensor],
) -> list[WrittenBlock]:
    """Write one .distcp file, and wait for the disk.

    Args:
        part: Number of the file.
        dtypes: Of the tensors, by key.
        shapes: Of the whole tensors, by key.
        read: Gives a block's tensor when it is about to be written.
    """
    writer = dcp.FileSystemWriter(folder)
    plan = SavePlan([_write_item(block, dtypes, shapes) for block in blocks])
    plan = writer.prepare_global_plan([SavePlan([])] * part + [plan])[part]  # gives the file its number
    by_place = {(block.tensor.key, block.first): block for block in blocks}
    planner = _OnDemand(lambda place: read(by_place[place]))
    written = writer.write_data(plan, planner).value()
    planner.release()
    return [
        (*_key_and_row(found.index), info.relative_path, info.offset, info.length)
        for found in written
        for info in (found.storage_data,)
    ]


def write_index(
    folder: Path,
    blocks: Sequence[Block],
    dtypes: dict[str, torch.dtype],
    shapes: dict[str, tuple[int, ...]],
    stored: Sequence[WrittenBlock],
) -> None:
    """Make a folder of .distcp files a checkpoint that Megatron loads."""
    sizes = {(block.tensor.key, block.first): block.tensor.shape for block in blocks}
    found = [
        StoredBox(key, shapes[key], _rows_at(first, shapes[key]), sizes[key, first], dtypes[key], file, offset, length)
        for key, first, file, offset, length in stored
    ]
    write_index_of_boxes(folder, found, {})


class StoredBox(NamedTuple):
    """Where a box of a tensor lies.

    Attributes:
        shape: Of the whole tensor.
        place: Index of the box's first element in it.
        sizes: Of the box.
        first, length: Bytes of the file.
    """

    key: str
    shape: tuple[int, ...]
    place: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    first: int
    length: int


def write_index_of_boxes(folder: Path, stored: Sequence[StoredBox], common: dict[str, Any]) -> None:
    """Make a folder of .distcp files a checkpoint that Megatron loads.

    Args:
        stored: All boxes, which together are whole tensors.
        common: What is no tensor.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # late: writing needs none of it

    tensors: dict[str, TensorStorageMetadata] = {}
    for box in stored:
        whole = TensorStorageMetadata(TensorProperties(dtype=box.dtype), torch.Size(box.shape), [])
        chunk = ChunkStorageMetadata(torch.Size(box.place), torch.Size(box.sizes))
        tensors.setdefault(box.key, whole).chunks.append(chunk)
    assert len(stored) <= MAX_BLOCKS, f"an index of {len(stored):,} blocks could not be read again"
    for key, tensor in tensors.items():
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel(), f"{key} is not whole"
    results = [
        WriteResult(MetadataIndex(box.key, box.place), box.length, _StorageInfo(box.file, box.first, box.length))
        for box in stored
    ]
    _IndexWriter(folder).finish(Metadata(dict(tensors)), [results])
    torch.save({**common, "content_metadata": CONTENT_METADATA}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _IndexWriter(dcp.FileSystemWriter):
    """Leaves out the folder, which torch adds to an index as a path. A path of Python 3.13 is of a class that earlier
    Pythons lack, so that Megatron's own loader could not read the index there."""

    @property
    def checkpoint_id(self) -> str:
        return ""


def _rows_at(first: int, shape: Sequence[int]) -> tuple[int, ...]:
    return (first, *(0 for _ in shape[1:]))


def _place(key: str, first: int, shape: Sequence[int]) -> MetadataIndex:
    return MetadataIndex(key, _rows_at(first, shape))


def _key_and_row(place: MetadataIndex) -> tuple[str, int]:
    assert place.offset is not None
    return place.fqn, place.offset[0]


def _write_item(block: Block, dtypes: dict[str, torch.dtype], shapes: dict[str, tuple[int, ...]]) -> WriteItem:
    key = block.tensor.key
    place = _place(key, block.first, shapes[key])
    assert place.offset is not None
    return WriteItem(
        place,
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(place.offset, torch.Size(block.tensor.shape)),
            TensorProperties(dtype=dtypes[key]),
            torch.Size(shapes[key]),
        ),
    )


class _OnDemand(DefaultSavePlanner):
    """A save planner that makes each block only when it is about to be written, and holds no more than one."""

    def __init__(self, read: Callable[[tuple[str, int]], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.block: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        self.release()
        self.block = self.read(_key_and_row(write_item.index))
        return self.block

    def release(self) -> None:
        """Free the block that has been written. torch.save keeps it in a cycle of objects, which may live for long."""
        if self.block is not None:
            self.block.untyped_storage().resize_(0)
            self.block = None
