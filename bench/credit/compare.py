"""Every seed prepared and every method trained, one run to a process at one thread."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.credit import training
from bench.credit.methods import GUIDANCE, METHODS, Method
from bench.credit.world import Effort
from bench.process import one_rank
from tgdpo_megatron.quiet import quiet


def compare(work: Path, effort: Effort, processes: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prepare every seed and train with every method. Returns what `prepare` and `run` return, in any order."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the processes start: libraries read it once
    prepared: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    names: dict[Future[dict[str, Any]], tuple[str, int, Method | None]] = {}
    total = len(effort.seeds) * len(METHODS)
    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_join) as pool,
        tqdm(total=total, desc="credit", unit="run") as progress,
    ):
        for seed in effort.seeds:
            names[pool.submit(training.prepare, work / str(seed), seed, effort)] = ("start and DPO", seed, None)
        while names:
            running = [f"{name} (seed {seed})" for future, (name, seed, _) in names.items() if not future.done()]
            progress.set_postfix_str(", ".join(running[:processes]))
            for future in wait(names, return_when=FIRST_COMPLETED).done:
                _, seed, method = names.pop(future)
                (runs if method else prepared).append(future.result())
                progress.update()
                if method is None:
                    for other in METHODS:
                        if other is not GUIDANCE:
                            submitted = pool.submit(training.run, work / str(seed), seed, other, effort)
                            names[submitted] = (other.name, seed, other)
    return prepared, runs


_joined = ExitStack()
"""What a process holds on to until it ends."""


def _join() -> None:
    """Make a process a job of one rank: once, since Megatron's groups are never given back."""
    quiet()
    _joined.enter_context(one_rank())
