"""The index of weights in several safetensors files: which tensor lies in which. Read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.errors import UserError

NAME = "model.safetensors.index.json"


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of the file beside the index that holds it.

    Raises:
        UserError: The index is damaged, names a tensor twice, or leads out of its folder.
    """
    try:
        index = read_json(path, what="index of weight shards", pairs=once)
    except TwiceError as error:
        raise UserError(f"{path}: the index names {error} twice; download it again.") from None
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    named = isinstance(mapping, dict) and all(isinstance(f, str) and Path(f).name == f for f in mapping.values())
    if not mapping or not named:
        raise UserError(f"{path}: the index of the weight shards is damaged; download it again.")
    return dict(mapping)


class TwiceError(Exception):
    """A name that one JSON object has twice. Python and safetensors would each take one of the two."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for json.loads.

    Raises:
        TwiceError: A name is there twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise TwiceError(name)
        found[name] = value
    return found
