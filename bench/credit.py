"""The token-credit benchmark: do token rewards find the wrong tokens, and what do methods make of them?

    python -m bench.credit [--fast] [--json results/credit.json] [--report runs/credit.html] [--picture FILE.svg]

The demo's generator knows which tokens are wrong. Every source of token rewards is ranked against that; every method
trains from the same start on the same pairs for the same steps, with several seeds. Runs go through the product's
engine, one to a process at one thread, as many processes as --processes says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.credit_methods import GUIDANCE, METHODS, Method
from bench.credit_world import Effort

FULL = Effort(seeds=(1, 2, 3, 4, 5))
FAST = Effort(seeds=(1, 2), train=200, validation=40, sft=400, sft_steps=15, steps=6, eval_interval=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="two seeds, few steps: shows that everything runs")
    parser.add_argument("--json", type=Path, default=Path("results/credit.json"), help="default: %(default)s")
    parser.add_argument("--report", type=Path, default=Path("runs/credit.html"), help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="SVG to write, none by default")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parsed = parser.parse_args()
    effort = FAST if parsed.fast else FULL
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        prepared, runs = compare(Path(work), effort, parsed.processes)
    seconds = time.monotonic() - began

    from bench.credit_report import as_text, headlines, methods_table, page, picture, sources_table, summarise
    from bench.run import machine

    where = machine()
    took = {"seconds": round(seconds), "cpu_seconds": round(_cpu_seconds())}
    summary = {"machine": where, **took, **summarise(prepared, runs, effort)}
    settings = [(name, str(value)) for name, value in (where | took).items()]
    contents = {parsed.json: json.dumps(summary, ensure_ascii=False), parsed.report: page(summary, settings)}
    if parsed.picture:
        contents[parsed.picture] = picture(summary)
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")
    print(f"{as_text(sources_table(summary))}\n\n{as_text(methods_table(summary))}\n")
    print("\n".join(headlines(summary)))
    print(f"{took['seconds']} s, {took['cpu_seconds']} CPU s; written: {', '.join(map(str, contents))}")


def _cpu_seconds() -> float:
    """Of this process and those it waited for: what a machine that others use too does not change much."""
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime


def compare(work: Path, effort: Effort, processes: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prepare every seed and train with every method. Returns what `prepare` and `run` return, in any order."""
    from bench import credit_training as training

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
    from bench.process import one_rank

    warnings.filterwarnings("ignore")
    _joined.enter_context(one_rank())


if __name__ == "__main__":
    main()
