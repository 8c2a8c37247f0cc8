"""Where and when the steps of a training are laid out."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from tgdpo_megatron.platform.processes import Ranks


def record(ranks: Ranks, *, jobs: list[dict[str, Any]], ahead: bool = True) -> list[dict[str, Any]]:
    """Train each job. Returns what it logged, and `[step, name of the thread]` for each step that was laid out.

    Args:
        ahead: Whether steps may be begun before they are asked for.
    """
    from tests.support.jobs import train_all
    from tgdpo_megatron import train
    from tgdpo_megatron.data.ahead import Ahead

    found = []
    lay_out, begin = train._lay_out, Ahead.begin
    for job in jobs:
        seen: list[Any] = []

        def recorded(run: Any, iteration: int, seen: list[Any] = seen) -> tuple[np.ndarray, Any]:
            seen.append([iteration, threading.current_thread().name.partition("_")[0]])
            return lay_out(run, iteration)

        train._lay_out = recorded  # type: ignore[assignment]
        if not ahead:
            Ahead.begin = lambda self, step: None  # type: ignore[method-assign]
        try:
            (logged,) = train_all(ranks, recipe="dpo_tiny", jobs=[job])
        finally:
            train._lay_out, Ahead.begin = lay_out, begin  # type: ignore[method-assign]
        alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]
        found.append({"logged": logged, "laid out": seen, "threads left": alive})
    return found
