"""The one place where measuring differs between a GPU and a CPU.

Without a GPU everything below still runs, on the CPU and at the sizes of a rehearsal: it shows that the programs work
from end to end, and its numbers mean nothing.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import files, process
from bench.rows import Row

REHEARSAL = not torch.cuda.is_available()
HERE = torch.device("cpu" if REHEARSAL else "cuda:0")
GIB = 2**30


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Wall-clock seconds until some work is done on the device, and its result."""
    synchronize()
    began = time.perf_counter()
    result = work(*arguments)
    synchronize()
    return time.perf_counter() - began, result


def synchronize() -> None:
    """Wait for the device."""
    if not REHEARSAL:
        torch.cuda.synchronize()


def total_memory() -> int:
    """Bytes of the GPU."""
    return torch.cuda.get_device_properties(HERE).total_memory


def allocated() -> int:
    """Bytes of the tensors that are alive on the device."""
    if REHEARSAL:
        return process.resident_bytes()
    synchronize()
    return torch.cuda.memory_allocated()


def peak(work: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """Most bytes of tensors on the device while some work ran, and its result."""
    synchronize()
    process.reset_peak() if REHEARSAL else torch.cuda.reset_peak_memory_stats()
    result = work(*arguments)
    synchronize()
    return process.peak_bytes() if REHEARSAL else torch.cuda.max_memory_allocated(), result


def free() -> None:
    """Give back what nothing refers to any more, so that the next model finds it."""
    gc.collect()
    if not REHEARSAL:
        torch.cuda.empty_cache()


def profile(work: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
    """What ran on the device, and the calls that put it there: events as torch's profiler writes them.

    On a GPU the host's operators are left out: recording them would slow the host down, and look like idle time.
    """
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU if REHEARSAL else kinds.CUDA]) as recorded:
        work(*arguments)  # the profiler itself waits for the device at the end
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events


def program(description: str | None, measure: Callable[[], Iterable[Row]]) -> None:
    """The command line of a file of rows that are measured on a GPU; in a rehearsal they have no targets."""
    files.program(description, lambda: _rehearsed(measure()) if REHEARSAL else measure())


def _rehearsed(measured: Iterable[Row]) -> Iterator[Row]:
    for row in measured:
        yield replace(row, target=None, note="; ".join(part for part in ("rehearsal", row.note) if part))
