"""The index of weights in several safetensors files: which tensor lies in which. Read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError

NAME = "model.safetensors.index.json"


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of the file beside the index that holds it.

    Raises:
        UserError: The index is damaged, names a tensor twice, or leads out of its folder.
    """
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)["weight_map"]
        if not mapping or not all(isinstance(file, str) and Path(file).name == file for file in mapping.values()):
            raise ValueError
    except TwiceError as error:
        raise UserError(f"{path}: the index names {error} twice; download it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: the index of the weight shards is damaged; download it again.") from None
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
