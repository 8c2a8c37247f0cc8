"""Trainings that are asked to stop at a step that was chosen, and others whose disk is full from a step on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.settings import RECIPES
from tgdpo_megatron.config import load
from tgdpo_megatron.errors import StoppedError, UserError
from tgdpo_megatron.incidents import Incidents
from tgdpo_megatron.platform.processes import Ranks


def stop_and_fill(ranks: Ranks, *, jobs: list[dict[str, Any]]) -> list[str]:
    """Run training jobs one after another; return the sentence that ended each, or "".

    Beside its settings a job may have `stop_after`, a step in which a signal comes, and `full_after`, the step after
    which the first rank cannot write samples.jsonl any more.
    """
    from megatron.core import parallel_state

    from tgdpo_megatron.train import train

    said = []
    for job in jobs:
        settings = dict(job)
        stop_after, full_after = settings.pop("stop_after", None), settings.pop("full_after", None)
        try:
            with _after_steps(ranks, stop_after, full_after):
                train(load(RECIPES["dpo_tiny"](), settings, where="test"), ranks)
            said.append("")
        except (StoppedError, UserError) as end:
            said.append(str(end))
        parallel_state.destroy_model_parallel()
    return said


@contextlib.contextmanager
def _after_steps(ranks: Ranks, stop_after: int | None, full_after: int | None) -> Iterator[None]:
    done = Incidents.done

    def and_then(self: Incidents, step: int, *arguments: Any) -> dict[str, float]:
        found = done(self, step, *arguments)
        if stop_after == step + 1 and ranks.rank == ranks.world_size - 1:  # it is noticed in the next step
            os.kill(os.getpid(), signal.SIGUSR1)
        if full_after == step and ranks.is_first:
            self.journals["samples.jsonl"].path = Path("/dev/full")
        return found

    Incidents.done = and_then  # type: ignore[method-assign]
    try:
        yield
    finally:
        Incidents.done = done  # type: ignore[method-assign]
