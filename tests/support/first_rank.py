"""Long work of the first rank, in ranks whose collectives have a short limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tgdpo_megatron.config import Config, load
from tgdpo_megatron.platform.processes import Ranks, on_first_rank


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


def hang_on_the_first_rank(ranks: Ranks, *, seconds: int) -> None:
    """Work in which the first rank stands still for a time, as on a machine that hangs."""
    if ranks.is_first:
        waker = ["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]
        subprocess.Popen(waker, start_new_session=True)  # not ended together with this rank
    on_first_rank(ranks, lambda: os.kill(os.getpid(), signal.SIGSTOP))
