"""By how many bytes a conversion, and the comparison for its certificate, raise the peak of a process's memory, once
the libraries are loaded, as JSON.

python -m tests.support.conversion_memory HF_FOLDER FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.core  # noqa: F401 (a library that conversion loads at its end)

from bench.process import peak_bytes, reset_peak, resident_bytes
from tests.parity.models import make_model
from tgdpo_megatron.checkpoint.certify import certify
from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf


def grown(convert: Callable[..., Any], source: Path, target: Path) -> int:
    before = resident_bytes()
    reset_peak()
    convert(source, target)
    return peak_bytes() - before


if __name__ == "__main__":
    source, folder = map(Path, sys.argv[1:])
    convert = partial(hf_to_megatron, certificate=False)
    found = {
        "to Megatron": grown(convert, source, folder / "megatron"),
        "to HuggingFace": grown(megatron_to_hf, folder / "megatron", folder / "back"),
    }
    make_model(0, "llama", tied=True).save_pretrained(folder / "small-hf")
    hf_to_megatron(folder / "small-hf", folder / "small")  # loads what a comparison needs
    found["certificate"] = grown(certify, source, folder / "megatron")
    print(json.dumps(found))
