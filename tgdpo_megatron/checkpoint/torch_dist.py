"""Megatron's checkpoint format, torch_dist, written some rows at a time, without a model or process group.

Every block of rows is a tensor of its own in a .distcp file. So a rank that needs a part of a tensor reads the blocks
that overlap it, and not the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from tgdpo_megatron.checkpoint.index import MAX_BLOCKS, StoredObject
from tgdpo_megatron.model.families.decoder import layer_of
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
    layers: int | None = None,
) -> list[WrittenBlock]:
    """Write one .distcp file, and wait for the disk.

    Args:
        part: Number of the file.
        dtypes: Of the tensors, by key.
        shapes: Of the whole tensors, by key.
        read: Gives a block's tensor when it is about to be written.
        layers: As for box_of.
    """
    writer = dcp.FileSystemWriter(folder)
    boxes = {(box.key, box.place): (block, box) for block in blocks for box in [box_of(block, shapes, layers)]}
    plan = SavePlan([_write_item(box, dtypes[block.tensor.key]) for block, box in boxes.values()])
    plan = writer.prepare_global_plan([SavePlan([])] * part + [plan])[part]  # gives the file its number
    planner = _OnDemand(lambda place: read(boxes[place][0]).view(boxes[place][1].sizes))
    written = writer.write_data(plan, planner).value()
    planner.release()
    return [
        (block.tensor.key, block.first, info.relative_path, info.offset, info.length)
        for found in written
        for info in (found.storage_data,)
        for block, _ in (boxes[_key_and_place(found.index)],)
    ]


def stored_boxes(
    blocks: Sequence[Block],
    dtypes: dict[str, torch.dtype],
    shapes: dict[str, tuple[int, ...]],
    stored: Sequence[WrittenBlock],
    layers: int | None = None,
) -> list[StoredBox]:
    """Where the boxes of all blocks lie, from what write_blocks returned of each.

    Args:
        layers: As for box_of.
    """
    boxes = {(block.tensor.key, block.first): box_of(block, shapes, layers) for block in blocks}
    return [
        StoredBox(*boxes[key, first], dtypes[key], file, offset, length) for key, first, file, offset, length in stored
    ]


class Box(NamedTuple):
    """A part of a tensor of a checkpoint.

    Attributes:
        shape: Of the whole tensor.
        place: Index of the box's first element in it.
        sizes: Of the box.
    """

    key: str
    shape: tuple[int, ...]
    place: tuple[int, ...]
    sizes: tuple[int, ...]


def box_of(block: Block, shapes: dict[str, tuple[int, ...]], layers: int | None = None) -> Box:
    """Which part of which tensor of a checkpoint a block is.

    Args:
        layers: How many layers the model has, where a tensor of all layers is to be stacked under one key. Default: the
            tensor of each layer has a key of its own.
    """
    key, sizes = block.tensor.key, block.tensor.shape
    shape, place = shapes[key], (block.first, *(0 for _ in sizes[1:]))
    layer, stacked = layer_of(key)
    if layers is None or layer is None:
        return Box(key, shape, place, sizes)
    return Box(stacked, (layers, *shape), (layer, *place), (1, *sizes))


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


def write_index_of_boxes(
    folder: Path,
    stored: Sequence[StoredBox],
    common: dict[str, Any],
    content: dict[str, Any] = CONTENT_METADATA,
    objects: Mapping[str, StoredObject] | None = None,
) -> None:
    """Make a folder of .distcp files a checkpoint that Megatron loads.

    Args:
        stored: All boxes, which together are whole tensors.
        common: What is no tensor.
        content: What Megatron is told of how the tensors are laid out.
        objects: What lies among the tensors and is none, by key.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # late: writing needs none of it

    tensors: dict[str, TensorStorageMetadata] = {}
    objects = objects or {}
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
    results += [
        WriteResult(MetadataIndex(key), one.length, _StorageInfo(one.file, one.start, one.length))
        for key, one in objects.items()
    ]
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {**tensors}
    entries |= {key: BytesStorageMetadata() for key in objects}
    _IndexWriter(folder).finish(Metadata(entries), [results])
    torch.save({**common, "content_metadata": content}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _IndexWriter(dcp.FileSystemWriter):
    """Leaves out the folder, which torch adds to an index as a path. A path of Python 3.13 is of a class that earlier
    Pythons lack, so that Megatron's own loader could not read the index there."""

    @property
    def checkpoint_id(self) -> str:
        return ""


def _key_and_place(place: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    assert place.offset is not None
    return place.fqn, tuple(place.offset)


def _write_item(box: Box, dtype: torch.dtype) -> WriteItem:
    place = torch.Size(box.place)
    chunk = ChunkStorageMetadata(place, torch.Size(box.sizes))
    whole = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(box.shape))
    return WriteItem(MetadataIndex(box.key, place), WriteItemType.SHARD, tensor_data=whole)


class _OnDemand(DefaultSavePlanner):
    """A save planner that makes each block only when it is about to be written, and holds no more than one."""

    def __init__(self, read: Callable[[tuple[str, tuple[int, ...]]], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.block: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        self.release()
        self.block = self.read(_key_and_place(write_item.index))
        return self.block

    def release(self) -> None:
        """Free the block that has been written. torch.save keeps it in a cycle of objects, which may live for long."""
        if self.block is not None:
            self.block.untyped_storage().resize_(0)
            self.block = None
