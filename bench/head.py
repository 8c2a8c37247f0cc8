"""The distributed head against Megatron's own output layer and cross-entropy: time and extra memory.

    python -m bench.head [--json FILE]

Same weights, hidden states, labels and per-token upstream gradients; equal log-probs and gradients asserted.
Megatron's computes logits for every token; ours for the labelled ones, never all at once. bf16, one thread.
Time: process CPU seconds, median of paired repeats. Memory: growth of the process's peak, each in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS, HIDDEN, VOCABULARY, LABELLED, REPEATS = 2048, 512, 32000, 0.70, 5
LIMITS = {"time": 1.0, "memory": 0.5}


@dataclass
class Problem:
    """One layer's inputs. Gradients end in `weight.main_grad`, as under Megatron's data parallelism."""

    hidden: Any
    weight: Any
    rows: Any
    labels: Any
    upstream: Any


def make_problem(tokens: int = TOKENS) -> Problem:
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 1, HIDDEN, generator=generator).bfloat16().requires_grad_()
    weight: Any = torch.nn.Parameter((0.05 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).bfloat16())
    weight.main_grad = torch.zeros(VOCABULARY, HIDDEN)
    weight.grad_added_to_main_grad = False
    rows = torch.randperm(tokens, generator=generator)[: int(LABELLED * tokens)].sort().values
    labels = torch.randint(0, VOCABULARY, (len(rows),), generator=generator)
    return Problem(hidden, weight, rows, labels, torch.randn(len(rows), generator=generator))


def ours(problem: Problem) -> Any:
    """Forward and backward through the distributed head. Returns the log-probs."""
    from megatron.core import parallel_state

    from tgdpo_megatron.model.head import labelled_logprobs

    logps = labelled_logprobs(
        [(problem.hidden, problem.weight)],
        problem.rows,
        problem.labels,
        vocab_size=VOCABULARY,
        sequence_parallel=False,
        group=parallel_state.get_tensor_model_parallel_group(),
    )[0]
    (logps * problem.upstream).sum().backward()
    return logps.detach()


def megatrons(problem: Problem) -> Any:
    """Forward and backward through Megatron's column-parallel output layer and unfused cross-entropy."""
    import torch
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    logits = linear_with_grad_accumulation_and_async_allreduce(
        input=problem.hidden,
        weight=problem.weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
    )
    labels = torch.zeros(problem.hidden.size(0), 1, dtype=torch.int64)
    labels[problem.rows, 0] = problem.labels
    upstream = torch.zeros(problem.hidden.size(0), 1)
    upstream[problem.rows, 0] = problem.upstream
    logps = -vocab_parallel_cross_entropy(logits, labels)
    (logps * upstream).sum().backward()
    with torch.no_grad():  # what Megatron's data-parallel hook does
        problem.weight.main_grad.add_(problem.weight.grad)
        problem.weight.grad = None
    return logps.detach()[problem.rows, 0]


METHODS: dict[str, Callable[[Problem], Any]] = {"ours": ours, "megatron": megatrons}


def start() -> None:
    """A process group of one, so that both run as they do in training."""
    import torch

    from tgdpo_megatron.config import ParallelConfig
    from tgdpo_megatron.platform.processes import initialize_model_parallel, job

    torch.set_num_threads(1)
    global _job
    _job = job("bench.head", processes=1, timeout_minutes=1)
    _job.__enter__()
    initialize_model_parallel(ParallelConfig(), seed=1)


def measure_memory(method: str) -> int:
    """Growth of this process's peak memory over one forward and backward, bytes."""
    start()
    METHODS[method](make_problem(tokens=16))  # loads kernels
    problem = make_problem()
    before = _resident()
    _reset_peak()
    METHODS[method](problem)
    return _peak() - before


def _resident() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def measure_time() -> dict[str, list[float]]:
    """CPU seconds of each method, repeats in turn, after checking that they agree."""
    start()
    _check_agreement()
    problem = make_problem()
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(REPEATS):
        for name, method in METHODS.items():
            problem.hidden.grad = None
            began = time.process_time()
            method(problem)
            seconds[name].append(time.process_time() - began)
    return seconds


def _check_agreement() -> None:
    found = {}
    for name, method in METHODS.items():
        problem = make_problem(tokens=256)
        found[name] = (method(problem), problem.hidden.grad.float(), problem.weight.main_grad)
    for mine, theirs, what in zip(*found.values(), ("log-probs", "hidden gradient", "weight gradient"), strict=True):
        # bf16 products in another order: a few units in the last of 8 bits, relative to the largest.
        difference = float((mine - theirs).abs().max() / theirs.abs().max())
        assert difference < 0.02, f"{what} differ by {difference:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--memory", choices=METHODS, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.memory:
        return print(measure_memory(parsed.memory))
    memory = {}
    for name in METHODS:
        command = [sys.executable, "-W", "ignore", "-m", "bench.head", "--memory", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
        memory[name] = int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    seconds = measure_time()
    ratios = {
        "time": statistics.median(a / b for a, b in zip(seconds["ours"], seconds["megatron"], strict=True)),
        "memory": memory["ours"] / memory["megatron"],
    }
    print(
        f"head, bf16, {TOKENS} tokens × {VOCABULARY} vocabulary, hidden {HIDDEN}, {LABELLED:.0%} labelled, one thread"
    )
    print(f"{'':10}{'ours':>12}{'Megatron':>12}{'ratio':>8}{'limit':>8}")
    mine, theirs = (statistics.median(seconds[name]) for name in METHODS)
    print(f"{'CPU s':10}{mine:12.2f}{theirs:12.2f}{ratios['time']:8.2f}{LIMITS['time']:8.2f}")
    mib = [memory[name] / 2**20 for name in METHODS]
    print(f"{'extra MiB':10}{mib[0]:12.0f}{mib[1]:12.0f}{ratios['memory']:8.2f}{LIMITS['memory']:8.2f}")
    if parsed.json:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = {"seconds": seconds, "memory_bytes": memory, "ratios": ratios, "limits": LIMITS}
        parsed.json.write_text(json.dumps(numbers, indent=1))
    sys.exit(0 if all(ratios[name] <= limit for name, limit in LIMITS.items()) else 1)


if __name__ == "__main__":
    main()
