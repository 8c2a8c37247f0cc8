"""HuggingFace weights on disk, read and written some rows at a time.

safetensors checks every file that is read. Reading and writing go by plain file offsets: pages of a memory-mapped shard
would count as this process's memory, and the library writes a shard only from memory that holds all of it.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tgdpo_megatron.checkpoint.failures import readable
from tgdpo_megatron.checkpoint.shard_index import NAME as _INDEX
from tgdpo_megatron.checkpoint.shard_index import TwiceError, once, read_index
from tgdpo_megatron.errors import UserError

SHARD_BYTES = 5 * 1000**3
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: file, name of the dtype, shape, and place of the first byte in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class HfWeights:
    """The tensors of a HuggingFace folder, read on demand.

    Raises:
        UserError: No weights in the folder, a missing, truncated or damaged shard, an index that does not fit the
            shards, or quantised weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = self._find()
        for name, stored in self._tensors.items():
            if stored.dtype not in (*_DTYPES, "F64"):
                raise UserError(
                    f"{folder}: {name} is stored as {stored.dtype}, so the weights are quantised; use a bf16 or fp32 "
                    "copy of the model."
                )

    def _find(self) -> dict[str, _Stored]:
        single, index = self.folder / "model.safetensors", self.folder / _INDEX
        if single.is_file():  # transformers reads it, too, whatever lies beside it
            return _read_header(single)
        if not index.is_file():
            raise UserError(
                f"{self.folder}: no weights there (model.safetensors or {_INDEX}); other formats are not read, because "
                "they would have to be unpickled."
            )
        mapping = read_index(index)
        shards = {file: _read_header(self.folder / file) for file in sorted(set(mapping.values()))}
        for name, file in mapping.items():
            if name not in shards[file]:
                raise UserError(f"{self.folder / file}: the index says that this shard holds {name}, but it does not.")
        return {name: shards[file][name] for name, file in mapping.items()}

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    @property
    def files(self) -> list[Path]:
        """The files that the tensors are in, and their index."""
        files = sorted({stored.file for stored in self._tensors.values()} | {_INDEX})
        return [self.folder / file for file in files if (self.folder / file).is_file()]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor.

        Raises:
            UserError: The tensor does not hold floating-point numbers of 16 or 32 bits.
        """
        stored = self._stored(name).dtype
        if stored not in _DTYPES:
            raise UserError(f"{self.folder}: {name} is stored as {stored}; only {', '.join(_DTYPES)} are converted.")
        return _DTYPES[stored]

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read some rows of a tensor. [count, …]"""
        stored, dtype = self._stored(name), self.dtype(name)
        shape = (count, *stored.shape[1:])
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        content = torch.empty(shape, dtype=dtype)
        path = self.folder / stored.file
        with readable(f"{path}: {name}"), path.open("rb", buffering=0) as file:
            file.seek(stored.start + first * row_bytes)
            rest = _memory_of(content)
            while len(rest):
                if not (got := file.readinto(rest)):
                    raise EOFError("the file ends early")
                rest = rest[got:]
        return content

    def _stored(self, name: str) -> _Stored:
        if name not in self._tensors:
            raise UserError(f"{self.folder}: the weights lack the tensor {name}.")
        return self._tensors[name]


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which must outlive the view. Its own numpy() would bar it from being freed."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _read_header(path: Path) -> dict[str, _Stored]:
    """What a shard says of its tensors, after safetensors has checked that it is true: their bytes fill the file."""
    if not path.is_file():
        raise UserError(f"{path}: this weight shard is missing; download it again.")
    try:
        with path.open("rb") as file, safe_open(path, framework="numpy"):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=once)
    except TwiceError as error:
        raise UserError(f"{path}: this weight shard holds {error} twice; download it again.") from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: this weight shard is damaged or truncated ({error}); download it again.") from None
    header.pop("__metadata__", None)
    return {
        name: _Stored(path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


@dataclass(frozen=True)
class HfTensor:
    """A tensor to be written: name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HfShards:
    """The files model*.safetensors that tensors will fill, and their index, if several.

    Every place is known before anything is written, so that several processes can write, in any order.

    Args:
        shard_bytes: Size of a file, at most; more only for a tensor that is larger.
    """

    def __init__(self, tensors: Sequence[HfTensor], shard_bytes: int | None = None) -> None:
        most = shard_bytes or SHARD_BYTES
        shards: list[list[HfTensor]] = [[]]
        for tensor in tensors:
            if shards[-1] and sum(other.bytes for other in shards[-1]) + tensor.bytes > most:
                shards.append([])
            shards[-1].append(tensor)
        number = len(shards)
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, HfTensor]] = {}
        for place, content in enumerate(shards, start=1):
            file = "model.safetensors" if number == 1 else f"model-{place:05d}-of-{number:05d}.safetensors"
            self._lay_out(file, content)

    def _lay_out(self, file: str, tensors: list[HfTensor]) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts, filled = {}, 0
        for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):  # so that all are aligned
            starts[tensor.name], end = filled, filled + tensor.bytes
            offsets = [filled, end]
            entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
            filled = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._headers[file] = len(header).to_bytes(8, "little") + header
        self._sizes[file] = len(self._headers[file]) + filled
        for tensor in tensors:
            self._places[tensor.name] = (file, len(self._headers[file]) + starts[tensor.name], tensor)

    def begin(self, folder: Path) -> None:
        """Make the files in their full size, without the tensors. A file that is there keeps its tensors."""
        for file, header in self._headers.items():
            with os.fdopen(os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as opened:
                opened.write(header)
                opened.truncate(self._sizes[file])

    def write(self, folder: Path, name: str, first: int, rows: Tensor) -> str:
        """Write some rows of a tensor, which begin at row `first`, and return the name of the file.

        The caller waits for the disk.
        """
        file, start, tensor = self._places[name]
        row_bytes = tensor.bytes // tensor.shape[0]
        with (folder / file).open("r+b", buffering=0) as opened:
            opened.seek(start + first * row_bytes)
            content = rows.to(tensor.dtype).contiguous()
            rest = _memory_of(content)
            while len(rest):
                rest = rest[opened.write(rest) :]
        return file

    def finish(self, folder: Path) -> None:
        """Write the index, if there are several files."""
        if len(self._headers) == 1:
            return
        total = sum(tensor.bytes for _, _, tensor in self._places.values())
        weight_map = {name: file for name, (file, _, _) in self._places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
