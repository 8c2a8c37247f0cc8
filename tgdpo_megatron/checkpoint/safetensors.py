"""HuggingFace weights on disk, read one tensor at a time and written one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tgdpo_megatron.errors import UserError

SHARD_BYTES = 5 * 1000**3
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class HfWeights:
    """The tensors of a HuggingFace folder, read on demand from memory-mapped files.

    Raises:
        UserError: No weights in the folder, or a missing or truncated shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self.shard_of = self._find_shards()

    def _find_shards(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                mapping: dict[str, str] = json.loads(index.read_text())["weight_map"]
                shards = sorted(set(mapping.values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index}: the index of the weight shards is damaged; download it again.") from None
            for shard in shards:
                self._open(shard)
            return mapping
        if (self.folder / "model.safetensors").is_file():
            return dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        raise UserError(
            f"{self.folder}: no weights there (model.safetensors or model.safetensors.index.json); "
            "other formats are not read, because they would have to be unpickled."
        )

    def _open(self, shard: str) -> Any:
        if shard not in self._files:
            path = self.folder / shard
            if not path.is_file():
                raise UserError(f"{path}: this weight shard is missing; download it again.")
            try:
                self._files[shard] = safe_open(path, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: this weight shard is damaged or truncated ({error}); download it again."
                ) from None
        return self._files[shard]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if name not in self.shard_of:
            raise UserError(f"{self.folder}: the weights lack the tensor {name}.")
        return tuple(self._open(self.shard_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it.

        Raises:
            UserError: The tensor does not hold floating-point numbers of 16 or 32 bits.
        """
        stored = self._open(self.shard_of[name]).get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise UserError(f"{self.folder}: {name} is stored as {stored}; only {', '.join(_DTYPES)} are converted.")
        return _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._open(self.shard_of[name]).get_tensor(name)
        return tensor


def write_shards(folder: Path, tensors: Sequence[tuple[str, int]], read: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors as model-*.safetensors with an index, holding one shard in memory at a time.

    Args:
        tensors: Name and size in bytes of each tensor, in the order in which `read` yields them.
        read: Yields the name and the tensor.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in tensors:
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for names, file in zip(shards, files, strict=True):
        content = dict(next(read) for _ in names)
        assert list(content) == names
        save_file(content, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(size for _, size in tensors)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
