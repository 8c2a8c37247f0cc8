"""What every measuring process does: be a job of one rank at one thread, count CPU seconds and resident memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


def resident_bytes() -> int:
    """Memory of this process now."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # see proc(5)


def peak_bytes() -> int:
    """Most memory of this process since reset_peak."""
    return _status("VmHWM")


def _status(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024
