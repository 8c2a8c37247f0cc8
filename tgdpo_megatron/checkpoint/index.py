"""The index of a checkpoint's tensors: which there are, and where their numbers lie.

torch writes it as a pickle, `.metadata`. It is read as data and checked against the files before anything is done with
it: an index that declares what no file holds is refused. torch is not loaded.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tgdpo_megatron.checkpoint.pickled import Made, Name, read_pickle
from tgdpo_megatron.errors import UserError, in_short

ITEM_BYTES = {
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1},
}
"""The dtypes that a checkpoint's tensors may have, and the bytes of a number."""
MAX_BYTES = 256 * 1024**2
"""Of an index. One of 60,000 blocks has 25 MB."""
MAX_BLOCKS = 300_000
"""Of an index that is written: it must be one that can be read. 100 instructions and 800 bytes of each are more than
any has."""
MAX_AXES = 16
"""Of a tensor."""
_MAX_CUT_AXES = 3
"""Axes along which blocks may part a tensor, as one with a matrix for each expert. Each block takes 2^axes steps."""
_MAX_NUMBER = 2**63 - 1
_FILE_NAME = re.compile(r"\w[\w-]*\.distcp", re.ASCII)


@dataclass(frozen=True)
class StoredBlock:
    """A part of a tensor, as torch.save wrote it into a part of a file."""

    offsets: tuple[int, ...]
    """Place of its first number in the tensor."""
    shape: tuple[int, ...]
    file: str
    start: int
    """First byte in the file."""
    length: int
    """Bytes in the file. They hold at least the block's numbers."""
    one_of: tuple[int, int] | None = None
    """Where the file holds several such blocks along one more axis, its first: which of them this is, and how many
    there are."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint. Each of its numbers lies in exactly one of its blocks."""

    dtype: str
    """A name of ITEM_BYTES."""
    shape: tuple[int, ...]
    blocks: tuple[StoredBlock, ...]

    def along_first_axis(self, place: int) -> StoredTensor:
        """One of the tensors that this one is made of along its first axis, such as one layer's of all layers'."""
        blocks = [
            replace(
                block,
                offsets=block.offsets[1:],
                shape=block.shape[1:],
                one_of=(place - block.offsets[0], block.shape[0]),
            )
            for block in self.blocks
            if block.offsets[0] <= place < block.offsets[0] + block.shape[0]
        ]
        return StoredTensor(self.dtype, self.shape[1:], tuple(blocks))


@dataclass(frozen=True)
class StoredObject:
    """What is no tensor: a part of a file that torch.save wrote."""

    file: str
    start: int
    """First byte in the file."""
    length: int


Index = dict[str, StoredTensor]
"""The tensors of a checkpoint by key."""


def read_index(folder: Path) -> Index:
    """Read and check the index of a folder of .distcp files.

    Raises:
        UserError: The index is damaged, holds anything but tensors, or is not that of the folder's files.
    """
    with _in_one_sentence(folder):
        return _Entries(folder).all_tensors()


class ForeignIndex:
    """The index of a checkpoint that another program saved, of which each entry is checked when it is asked for.

    Other entries, such as objects and parts of the optimizer's state, are left alone.

    Attributes:
        folder: Of the .distcp files.
        tensors: The keys of all tensors.

    Raises:
        UserError: The index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with _in_one_sentence(folder):
            self._entries = _Entries(folder)
            self.tensors = [key for key, entry in self._entries.declared.items() if not _is_object(entry)]
        self._checked: dict[str, StoredTensor] = {}

    def tensor(self, key: str) -> StoredTensor:
        """A tensor.

        Raises:
            UserError: There is none, or the files do not hold it.
        """
        if key not in self._checked:  # its places in the files are used up by the check
            with _in_one_sentence(self.folder):
                self._checked[key] = self._entries.tensor(key)
        return self._checked[key]

    def object(self, key: str) -> StoredObject | None:
        """Where an object lies; None where there is none of that name.

        Raises:
            UserError: The files do not hold it.
        """
        with _in_one_sentence(self.folder):
            return self._entries.object(key)


@contextlib.contextmanager
def _in_one_sentence(folder: Path) -> Iterator[None]:
    """Say of the index what a reader finds wrong with it."""
    path = folder / ".metadata"
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: the checkpoint's index cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path}: the checkpoint's index is damaged ({in_short(error)}).") from error


def _pickled(path: Path) -> Any:
    if not path.is_file():
        raise ValueError("it is no file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    return read_pickle(path.read_bytes())


class _Entries:
    """What an index says, not yet believed."""

    def __init__(self, folder: Path) -> None:
        state = _state(_pickled(folder / ".metadata"), "Metadata")
        self.folder = folder
        self.declared = {_a(str, key): entry for key, entry in _a(dict, state.get("state_dict_metadata")).items()}
        self.places = dict(self._places(_a(dict, state.get("storage_data") or {})))
        self.sizes: dict[str, int] = {}
        """Bytes of the files that were looked at."""

    def all_tensors(self) -> Index:
        found = {key: self.tensor(key) for key in self.declared}
        if self.places:
            raise ValueError(f"it places a block of {next(iter(self.places))[0]!r} that no tensor has")
        return found

    @staticmethod
    def _places(stored: dict[Any, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], dict[str, Any]]]:
        for index, info in stored.items():
            at = _state(index, "MetadataIndex")
            offset = at.get("offset")
            key = (_a(str, at.get("fqn")), None if offset is None else _sizes(offset))
            yield key, _state(info, "_StorageInfo")

    def tensor(self, key: str) -> StoredTensor:
        if _is_object(entry := self.declared.get(key)):
            raise ValueError(f"it says that {key!r} is an object, and not a tensor, which no checkpoint here holds")
        state = _state(entry, "TensorStorageMetadata")
        dtype, shape = _dtype(state.get("properties")), _sizes(state.get("size"))
        chunks = _a(list, state.get("chunks"))
        if len(chunks) > len(self.places):
            raise ValueError(f"it has more blocks of {key!r} than places for them")
        blocks = tuple(self._block(key, _state(chunk, "ChunkStorageMetadata"), dtype, shape) for chunk in chunks)
        if not _is_parted(shape, [(block.offsets, block.shape) for block in blocks]):
            raise ValueError(f"the blocks of {key!r} are not the whole tensor")
        return StoredTensor(dtype, shape, blocks)

    def object(self, key: str) -> StoredObject | None:
        if not _is_object(self.declared.get(key)) or (place := self.places.get((key, None))) is None:
            return None
        return StoredObject(*self._part(place))

    def _block(self, key: str, chunk: dict[str, Any], dtype: str, whole: tuple[int, ...]) -> StoredBlock:
        offsets, shape = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
        inside = len(offsets) == len(shape) == len(whole) and all(
            first + count <= size for first, count, size in zip(offsets, shape, whole, strict=True)
        )
        if not inside:
            raise ValueError(f"a block of {key!r} does not lie inside the tensor")
        if (place := self.places.pop((key, offsets), None)) is None:
            raise ValueError(f"it has no place for a block of {key!r}")
        if place.get("transform_descriptors"):
            raise ValueError(f"a block of {key!r} is not stored as it is")
        block = StoredBlock(offsets, shape, *self._part(place))
        if math.prod(shape) * ITEM_BYTES[dtype] > block.length:
            raise ValueError(f"a block of {key!r} has more numbers than its {block.length} bytes hold")
        return block

    def _part(self, place: dict[str, Any]) -> tuple[str, int, int]:
        """The name of a file, the first byte of a part that lies in it, and the part's bytes."""
        file, start, length = _a(str, place.get("relative_path")), _count(place.get("offset")), place.get("length")
        if start + _count(length) > self._size(file):
            raise self._unreadable(file, "it ends before a block that the index places in it")
        return file, start, _count(length)

    def _size(self, name: str) -> int:
        """Bytes of a file of the folder. No other file can be named, nor a link to one."""
        if name not in self.sizes:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a file of a checkpoint")
            path = self.folder / name
            if os.path.dirname(os.path.realpath(path)) != os.path.realpath(self.folder):
                raise ValueError(f"{name} is a link to a file outside the checkpoint")
            if not path.is_file():
                raise self._unreadable(name, "no such file")
            self.sizes[name] = path.stat().st_size
        return self.sizes[name]

    def _unreadable(self, name: str, why: str) -> UserError:
        return UserError(f"{self.folder / name}: this part of the checkpoint cannot be read ({why}).")


def _is_parted(whole: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes inside a tensor hold each of its numbers exactly once.

    Where a number is counted can be read from corners: from the lower one of a box on in every direction there is one
    more, from the next corner on one less, and so on with the sign of each. No two coverings have the same signed
    corners. So boxes part a tensor exactly where their corners, added up, are those of the whole.

    Args:
        boxes: The offsets and sizes of each.

    Raises:
        ValueError: It is cut along so many axes that no model's tensor is.
    """
    if 0 in whole:
        return True
    cut = [
        axis for axis, size in enumerate(whole) if any(offsets[axis] or sizes[axis] != size for offsets, sizes in boxes)
    ]
    if len(cut) > _MAX_CUT_AXES:
        raise ValueError(f"it has a tensor that is cut along {len(cut)} axes")
    signs = [math.prod(signs) for signs in itertools.product((1, -1), repeat=len(cut))]
    corners: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in boxes:
        ends = [(offsets[axis], offsets[axis] + sizes[axis]) for axis in cut]
        for corner, sign in zip(itertools.product(*ends), signs, strict=True):
            corners[corner] += sign
    for corner, sign in zip(itertools.product(*((0, whole[axis]) for axis in cut)), signs, strict=True):
        corners[corner] -= sign
    return not any(corners.values())


def _is_object(entry: Any) -> bool:
    return isinstance(entry, Made) and entry.is_a("BytesStorageMetadata")


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _state(value: Any, name: str) -> dict[str, Any]:
    """The fields of a record of a class."""
    if not (isinstance(value, Made) and value.is_a(name) and isinstance(value.state, dict)):
        raise ValueError(f"it has something else where a {name} belongs")
    return value.state


def _dtype(properties: Any) -> str:
    if not (isinstance(properties, Made) and properties.is_a("TensorProperties") and type(properties.state) is tuple):
        raise ValueError("it has something else where a tensor's properties belong")
    dtype = properties.state[0] if properties.state else None
    if not (isinstance(dtype, Name) and dtype.module == "torch" and dtype.name in ITEM_BYTES):
        raise ValueError(f"it has a tensor of the dtype {dtype.name if isinstance(dtype, Name) else None!r}")
    return dtype.name


def _sizes(value: Any) -> tuple[int, ...]:
    """The numbers of a torch.Size."""
    if not (isinstance(value, Made) and value.is_a("Size") and len(value.arguments) == 1):
        raise ValueError("it has something else where a torch.Size belongs")
    sizes = _a(tuple, value.arguments[0])
    if len(sizes) > MAX_AXES:
        raise ValueError(f"it has a tensor of {len(sizes)} axes")
    return tuple(map(_count, sizes))


def _count(value: Any) -> int:
    if not 0 <= (found := int(_a(int, value))) <= _MAX_NUMBER:
        raise ValueError(f"it has the size {found}")
    return found
