"""Tensors and plain data of a checkpoint, read by a reader that can yield nothing else.

torch.save writes a zip file: `data.pkl`, a pickle that describes what was saved, and a file of numbers for each tensor.
The pickle is read as data, and the numbers are read from their place: only the rows that are wanted.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tgdpo_megatron.checkpoint.index import ITEM_BYTES, MAX_AXES, Index, StoredBlock, StoredTensor
from tgdpo_megatron.checkpoint.pickled import Made, Name, Outside, read_pickle

_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    "ByteStorage": "uint8",
}
"""torch's names for the numbers of a tensor, and their dtypes."""
_MAX_HEAD_BYTES = 1024**2
"""Of a pickle or a list of files in a zip file. A tensor's have some hundred bytes."""
_MAX_STATE_BYTES = 16 * 1024**2
"""Of a pickle that is itself what was saved. Megatron-LM's arguments have 10 to 20 KB, and more with the paths of
thousands of files of data."""
_MAX_PARTS = 100_000
"""Values, lists and so on of plain data, counted each time that they are referred to."""
_MAX_DEPTH = 50


def read_rows(folder: Path, index: Index, key: str, first: int, shape: Sequence[int]) -> Tensor:
    """Read rows of a tensor, which may lie in blocks of any shape.

    Args:
        folder: Of the .distcp files.
        index: The checkpoint's index.
        first: Place of the first row in the whole tensor.
        shape: Of the rows.

    Raises:
        ValueError, OSError: As read_into.
    """
    target = torch.empty(tuple(shape), dtype=getattr(torch, index[key].dtype))
    read_into(target, folder, index[key], (first, *(0 for _ in shape[1:])))
    return target


def read_into(target: Tensor, folder: Path, stored: StoredTensor, offsets: Sequence[int]) -> None:
    """Fill a tensor with a region of a stored one, from as few bytes of its files as hold it.

    Args:
        target: Of the region's shape, on any device. Numbers are converted to its dtype.
        offsets: Place of the region's first number in the stored tensor.

    Raises:
        ValueError: The files do not hold what the index says.
        OSError: A file cannot be read.
    """
    filled = 0
    for block in stored.blocks:
        region = [
            (max(here, there), min(here + size, there + count))
            for here, size, there, count in zip(offsets, target.shape, block.offsets, block.shape, strict=True)
        ]
        if any(begin >= end for begin, end in region):
            continue
        numbers = _block_region(folder, stored.dtype, block, region)
        place = tuple(slice(begin - here, end - here) for (begin, end), here in zip(region, offsets, strict=True))
        target[place].copy_(numbers)
        filled += numbers.numel()
    if filled != target.numel():
        raise ValueError("the index does not cover the whole tensor")


def read_plain(path: Path) -> Any:
    """What torch.save wrote of None, bools, numbers, texts, lists, tuples, dicts and tensors, whatever their nesting.

    Raises:
        ValueError: Damaged, or it holds anything else.
        OSError: The file cannot be read.
    """
    if not path.is_file():
        raise ValueError("no such file")
    with path.open("rb") as file:
        saved = _Saved(file, 0, path.stat().st_size)
        return _Plain(saved).value(saved.content)


def read_described(path: Path, start: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote into a file, or into a part of one, as its pickle describes it: see read_pickle.

    Raises:
        ValueError: Damaged.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return _Saved(file, start, path.stat().st_size if length is None else length, _MAX_STATE_BYTES).content


def _block_region(folder: Path, dtype: str, block: StoredBlock, region: Sequence[tuple[int, int]]) -> Tensor:
    """Numbers of a block. Of the rows that hold the region nothing else is read.

    Args:
        region: For each axis the begin and the end, in the whole tensor.
    """
    with (folder / block.file).open("rb") as file:
        saved = _Saved(file, block.start, block.length)
        tensor = saved.tensor(saved.content)
        if block.one_of is not None and tensor.shape[:1] == block.one_of[1:]:
            tensor = tensor.along_first_axis(block.one_of[0])
        if (tensor.dtype, tensor.shape) != (dtype, block.shape):
            raise ValueError(f"{block.file} holds another tensor than the index says")
        inside = [(begin - first, end - first) for (begin, end), first in zip(region, block.offsets, strict=True)]
        if inside:
            rows, *columns = inside
            numbers = saved.read(tensor.rows(*rows))
            for axis, (begin, end) in enumerate(columns, start=1):
                numbers = numbers.narrow(axis, begin, end - begin)
            return numbers
        return saved.read(tensor)


@dataclass(frozen=True)
class _Described:
    """A tensor as the pickle describes it. Counts are of numbers."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """Of the first number in the storage."""
    storage: str

    @property
    def span(self) -> int:
        """How far the tensor reaches in its storage."""
        if 0 in self.shape:
            return 0
        return 1 + sum((count - 1) * stride for count, stride in zip(self.shape, self.strides, strict=True))

    def rows(self, begin: int, end: int) -> _Described:
        shape, offset = (end - begin, *self.shape[1:]), self.offset + begin * self.strides[0]
        return _Described(self.dtype, shape, self.strides, offset, self.storage)

    def along_first_axis(self, place: int) -> _Described:
        offset = self.offset + place * self.strides[0]
        return _Described(self.dtype, self.shape[1:], self.strides[1:], offset, self.storage)


class _Saved:
    """What torch.save wrote into a part of a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int, most: int = _MAX_HEAD_BYTES) -> None:
        """Read the description; the numbers stay where they are.

        Args:
            most: Bytes that the description may have.

        Raises:
            ValueError: The part holds no such thing.
        """
        self.file, self.start = file, start
        part = _Part(file, start, length)
        try:
            with zipfile.ZipFile(part) as archive:
                self.entries = {entry.filename: entry for entry in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, LookupError, struct.error) as error:
            raise ValueError(f"it is not a file of torch.save ({error})") from error
        heads = [name for name in self.entries if name.endswith("/data.pkl")]
        if len(heads) != 1:
            raise ValueError("it is not a file of torch.save (no data.pkl)")
        self.name, self.length = heads[0].removesuffix("data.pkl"), length
        first, size = self._where(heads[0])
        if size > most:
            raise ValueError(f"its description has {size:,} bytes")
        file.seek(first)
        self.content = read_pickle(file.read(size))

    def tensor(self, value: Any) -> _Described:
        """The tensor that a record stands for.

        Raises:
            ValueError: It stands for something else, or for a tensor beyond its storage.
        """
        if not (isinstance(value, Made) and value.is_a("_rebuild_tensor_v2") and len(value.arguments) >= 4):
            raise ValueError("it holds something else where a tensor belongs")
        outside, offset, shape, strides = value.arguments[:4]
        reference = outside.reference if isinstance(outside, Outside) else None
        if not (type(reference) is tuple and len(reference) == 5 and isinstance(reference[1], Name)):
            raise ValueError("it holds a tensor without numbers")
        if (dtype := _STORAGES.get(reference[1].name)) is None or type(reference[2]) is not str:
            raise ValueError(f"it holds a tensor of a {reference[1].name!r}")
        if not (_counts(shape) and _counts(strides) and _counts((offset,)) and len(shape) == len(strides)):
            raise ValueError("it holds a tensor whose shape is damaged")
        tensor = _Described(dtype, shape, strides, offset, f"{self.name}data/{reference[2]}")
        reach = max(offset + tensor.span, math.prod(shape))  # strides of 0 show a number many times
        if reach * ITEM_BYTES[dtype] > self._where(tensor.storage)[1] or max(shape, default=0) > self.length:
            raise ValueError("it holds a tensor that is larger than its numbers")
        return tensor

    def read(self, tensor: _Described) -> Tensor:
        """The numbers of a tensor, or of rows of one. CPU."""
        dtype = getattr(torch, tensor.dtype)
        numbers = torch.empty(tensor.span, dtype=dtype)
        self.file.seek(self._where(tensor.storage)[0] + tensor.offset * ITEM_BYTES[tensor.dtype])
        into: Any = numbers.view(torch.uint8).numpy()
        if self.file.readinto(into) != numbers.nbytes:
            raise ValueError("it ends too early")
        return numbers.as_strided(tensor.shape, tensor.strides)

    def _where(self, name: str) -> tuple[int, int]:
        """First byte in the file, and bytes, of one of the zip's files."""
        if (entry := self.entries.get(name)) is None or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"it lacks {name!r} as torch.save stores it")
        if not 0 <= entry.header_offset < self.length:
            raise ValueError(f"{name!r} does not lie where the zip file says")
        self.file.seek(self.start + entry.header_offset)
        if len(head := self.file.read(_LOCAL_HEADER.size)) < _LOCAL_HEADER.size:
            raise ValueError("it ends too early")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(head)
        first = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\3\4" or first + entry.file_size > self.length:
            raise ValueError(f"{name!r} does not lie where the zip file says")
        return self.start + first, entry.file_size


_LOCAL_HEADER = struct.Struct("<4s22x2H")
"""What stands before each file of a zip: a signature and, at its end, the lengths of the name and of an extra part."""


def _counts(values: Any) -> bool:
    return (
        type(values) is tuple
        and len(values) <= MAX_AXES
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


class _Part:
    """A part of a file as a file of its own, for the head of a zip: no read of more than a head is answered."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self.file, self.start, self.length, self.place = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, place: int, whence: int = 0) -> int:
        place += {0: 0, 1: self.place, 2: self.length}[whence]
        if not 0 <= place <= self.length:
            raise ValueError("it is not a file of torch.save (a place outside it)")
        self.place = place
        return place

    def read(self, count: int = -1) -> bytes:
        left = self.length - self.place
        count = left if count < 0 else min(count, left)
        if count > _MAX_HEAD_BYTES:
            raise ValueError("it is not a file of torch.save (its list of files is too long)")
        self.file.seek(self.start + self.place)
        found = self.file.read(count)
        self.place += len(found)
        return found


class _Plain:
    """Turns what a pickle says into plain data, some parts and some depth at most."""

    def __init__(self, saved: _Saved) -> None:
        self.saved, self.parts, self.bytes = saved, 0, 0

    def value(self, value: Any, depth: int = 0) -> Any:
        self.parts += 1
        if self.parts > _MAX_PARTS or depth > _MAX_DEPTH:
            raise ValueError("it holds more than plain data has")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if type(value) in (list, tuple):
            return type(value)(self.value(part, depth + 1) for part in value)
        if isinstance(value, dict):
            return {self._key(key): self.value(part, depth + 1) for key, part in value.items()}
        if isinstance(value, Made):
            return self._tensor(value)
        raise ValueError(f"it holds a {type(value).__name__}, which is no plain data")

    def _key(self, key: Any) -> str | int:
        if not isinstance(key, str | int):
            raise ValueError(f"it has a {type(key).__name__} as a key")
        return key

    def _tensor(self, value: Made) -> Tensor:
        if not value.is_a("_rebuild_tensor_v2"):
            raise ValueError(f"it names {value.of.module}.{value.of.name}, which is no plain data")
        tensor = self.saved.tensor(value)
        self.bytes += math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if self.bytes > self.saved.length:
            raise ValueError("it holds tensors that are larger than itself")
        return self.saved.read(tensor)
