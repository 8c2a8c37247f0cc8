"""The public commands, each in a process of its own, many of them a minute.

A command spends most of its start on importing torch, transformers and Megatron. Here one process imports them, and
every command is a copy of it that then does what the program does when it is typed: it reads its command line, works,
and ends. Jobs of several commands run side by side, each command at one thread.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROGRAMS = (
    "bench.mini.scorer",
    "recipes.score",
    "recipes.train",
    "tools.annotate",
    "tools.compare",
    "tools.convert_hf_to_megatron",
    "tools.make_tiny_model",
    "tools.prepare_pairs",
    "tools.sample",
)
_LATE = (
    "tgdpo_megatron.checkpoint.convert",
    "tgdpo_megatron.evaluation.comparison_page",
    "tgdpo_megatron.evaluation.log_probs",
    "tgdpo_megatron.planning.out_of_memory",
    "tgdpo_megatron.reward_models.classifier",
    "tgdpo_megatron.sampling.transformers_engine",
    "tgdpo_megatron.score",
    "tgdpo_megatron.train",
    "transformers.models.llama.modeling_llama",
)
"""What the programs import once they have read their command line."""

_FORK = multiprocessing.get_context("fork")


def import_everything() -> None:
    """Import what the commands import. Afterwards this process has no threads beside its own, so it can be forked."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a copy of this process could not use a GPU
    from tgdpo_megatron.platform import checks, cpu, torch_adam, torch_clip
    from tgdpo_megatron.quiet import quiet

    quiet()
    checks.check_packages()
    cpu.install()
    torch_adam.install()
    torch_clip.install()
    tqdm.monitor_interval = 0  # a thread otherwise
    for module in (*PROGRAMS, *_LATE):
        importlib.import_module(module)


class Commands:
    """Runs commands one after another, and keeps what each said in a file.

    Args:
        logs: Folder of these files.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, module: str, *arguments: str | Path) -> None:
        """Run one of PROGRAMS.

        Raises:
            RuntimeError: It failed.
        """
        words = list(map(str, arguments))
        log = self.logs / f"{len(list(self.logs.iterdir())) + 1:03}-{module}.log"
        log.write_text(f"$ {shlex.join(['python', '-m', module, *words])}\n", encoding="utf-8")
        process = _FORK.Process(target=_be, args=(module, words, log))
        process.start()
        process.join()
        if process.exitcode:
            said = log.read_text(encoding="utf-8")
            raise RuntimeError(f"{said[-4000:]}\n{module} ended with exit code {process.exitcode}")


def _be(module: str, words: Sequence[str], log: Path) -> None:
    """What the forked process does: be the program, and speak to the file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = [module, *words]
    sys.modules[module].main()


def side_by_side(jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], processes: int, what: str) -> list[Any]:
    """Do functions with their arguments, so many at a time. Returns their results in the order of the jobs."""
    with (
        ProcessPoolExecutor(processes, _FORK) as pool,
        tqdm(total=len(jobs), desc=what, unit="job", smoothing=0) as progress,
    ):
        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        waiting: set[Future[Any]] = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            progress.update(len(done))
            for future in done:
                if future.exception():
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise future.exception() or AssertionError
    return [future.result() for future in futures]
