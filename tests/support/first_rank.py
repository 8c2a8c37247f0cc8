"""Long work of the first rank, in ranks whose collectives have a short limit."""

from __future__ import annotations

import time
from pathlib import Path

from tgdpo_megatron.config import Config, load
from tgdpo_megatron.platform.processes import Ranks


def load_slowly(ranks: Ranks, *, checkpoint: str, pairs: str, folder: str, seconds_per_pair: float) -> int:
    """Load data whose tokenisation takes its time. Returns the number of pairs."""
    from tgdpo_megatron import preflight
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.data import prepare

    encode = prepare._encode

    def slow(*arguments: object) -> object:
        time.sleep(seconds_per_pair)
        return encode(*arguments)  # type: ignore[arg-type]

    prepare._encode = slow  # type: ignore[assignment]
    settings = {"model": {"checkpoint": checkpoint}, "data": {"train": pairs, "max_length": 64}}
    data, _ = preflight.load_data(
        load(Config(), settings, where="test"), describe(Path(checkpoint)), ranks, Path(folder)
    )
    return len(data)
