"""What every measuring process does: be a job of one rank at one thread, and count CPU seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """This process as a job of one rank, so that all runs as it does in training, at one thread."""
    from tgdpo_megatron.config import ParallelConfig
    from tgdpo_megatron.platform.processes import initialize_model_parallel, job

    torch.set_num_threads(1)
    with job("bench", processes=1, timeout_minutes=10):
        initialize_model_parallel(ParallelConfig(), seed=1)
        yield


def cpu_seconds(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Process CPU seconds of some work, and its result."""
    began = time.process_time()
    result = work(*arguments)
    return time.process_time() - began, result
