"""By how many bytes a conversion raises the peak of its process's memory, once its libraries are loaded, as JSON.

python -m tests.support.conversion_memory HF_FOLDER FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.core  # noqa: F401 (a library that conversion loads at its end)

from bench.process import peak_bytes, reset_peak, resident_bytes
from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf


def grown(convert: Callable[..., Any], source: Path, target: Path) -> int:
    before = resident_bytes()
    reset_peak()
    convert(source, target)
    return peak_bytes() - before


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    to_megatron = grown(hf_to_megatron, Path(sys.argv[1]), folder / "megatron")
    to_huggingface = grown(megatron_to_hf, folder / "megatron", folder / "back")
    print(json.dumps({"to Megatron": to_megatron, "to HuggingFace": to_huggingface}))
