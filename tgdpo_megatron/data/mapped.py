"""Arrays that stay in their files. The pages that are read belong to the system, once for all processes of a machine.

So a process that reads its share of the pairs takes no memory of its own for the others.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

_DTYPES = {"F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1"}


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, which cannot be written to. Each page is read when it is first used.

    A file must not be cut short while it is mapped: a process that reads a page that is gone is killed. So a file is
    replaced by another one, never written over.

    Raises:
        SafetensorError: Its header is damaged, or its arrays do not fill it: it may have been cut.
        OSError: It cannot be opened.
        ValueError: It is empty, or was cut a moment ago.
        KeyError: It holds an array of another dtype.
    """
    with path.open("rb") as file, safe_open(path, framework="numpy"):  # the library checks header and size
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    return {name: _array(content, 8 + length, entry) for name, entry in header.items()}


def _array(content: mmap.mmap, first: int, entry: dict[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    count = (end - begin) // dtype.itemsize
    flat = np.frombuffer(content, dtype, count, first + begin) if count else np.empty(0, dtype)
    return flat.reshape(entry["shape"])


class Scattered:
    """An fp32 array in pieces that lie anywhere in several others, for example in files. It holds their places alone.

    Args:
        parts: What the pieces lie in: arrays, or slices of files that safetensors reads. Each [n] fp32.
        sizes: Length of each part.
        starts: Piece i is [starts[i], starts[i + 1]) of this array. [pieces + 1] int64.
        places: Where each piece begins when the parts are taken one after another. [pieces] int64.
    """

    def __init__(self, parts: Sequence[Any], sizes: Sequence[int], starts: np.ndarray, places: np.ndarray) -> None:
        self.parts, self.starts, self.places = parts, starts, places
        self.begins = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """A piece, or a part of one. Its bounds must be given.

        Raises:
            IndexError: The slice goes beyond its piece.
        """
        begin, end = int(wanted.start), int(wanted.stop)
        piece = int(np.searchsorted(self.starts, begin, side="right")) - 1
        if not begin <= end <= self.starts[min(piece + 1, len(self.places))]:
            raise IndexError(f"[{begin}, {end}) is not within a piece")
        if begin == end:
            return np.empty(0, np.float32)
        place = int(self.places[piece]) + begin - int(self.starts[piece])
        part = int(np.searchsorted(self.begins, place, side="right")) - 1
        place -= int(self.begins[part])
        found: np.ndarray = self.parts[part][place : place + end - begin]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, as a new array in memory. It lies nowhere as one array, so `copy` changes nothing."""
        pieces = [self[slice(begin, end)] for begin, end in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return np.concatenate([np.empty(0, np.float32), *pieces]).astype(dtype or np.float32, copy=False)
