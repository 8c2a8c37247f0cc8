"""The distributed head against Megatron's own output layer and cross-entropy, and against a chunked scheme with fp32
backward products: time and extra memory.

    python -m bench.speed.head

Same weights, hidden states, labels and per-token upstream gradients; equal log-probs and gradients asserted.
Megatron's and the chunked scheme compute logits for every token; ours for the labelled ones. bf16, one thread.
Time: process CPU seconds, all methods in turn. Memory: growth of the process's peak over forward and backward, each in
a fresh process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.files import program
from bench.heads import (
    HIDDEN,
    LABELLED,
    ROUNDING,
    TOKENS,
    VOCABULARY,
    Problem,
    differences,
    for_all_tokens,
    into_main_grad,
    make_problem,
    megatrons,
    ours,
)
from bench.process import cpu_seconds, one_rank, peak_bytes, reset_peak, resident_bytes
from bench.rows import Row, paired
from bench.speed.limits import NEAR, Timed, within_limit

REPEATS, UNIT_REPEATS = 7, 3
CHUNK_ROWS = 256
MEMORY_TARGETS = {2048: 0.35, 8192: 0.15}


class _ChunkedLogProbs(torch.autograd.Function):
    """Log-probs of all tokens by chunks of rows, as NeMo-RL computes them with
    `logprob_chunk_size` (its commit 7ea279ab).

    Forward: a bf16 product, fp32 log-softmax and gather for each chunk; only the inputs are kept. Backward: logits
    again, their gradient from a dense one-hot matrix, and both products in fp32 with the weight cast for each chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        return torch.cat(
            [
                (rows @ weight.t()).float().log_softmax(dim=-1).gather(1, wanted[:, None]).squeeze(1)
                for rows, wanted in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True)
            ]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for rows, wanted, upstream in zip(*(x.split(CHUNK_ROWS) for x in (hidden, labels, grad)), strict=True):
            probabilities = (rows @ weight.t()).float().softmax(dim=-1)
            one_hot = torch.nn.functional.one_hot(wanted, weight.size(0)).float()
            grad_logits = (one_hot - probabilities) * upstream[:, None]
            grad_hidden.append((grad_logits @ weight.float()).to(hidden.dtype))
            grad_weight += grad_logits.t() @ rows.float()
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None


def chunked(problem: Problem) -> Tensor:
    """Forward and backward by chunks of rows with fp32 backward products."""
    labels, upstream = for_all_tokens(problem)
    logps: Tensor = _ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
        problem.hidden.squeeze(1), problem.weight, labels
    )
    (logps * upstream).sum().backward()
    into_main_grad(problem.weight)
    return logps.detach()[problem.predictors]


METHODS: dict[str, Callable[[Problem], Tensor]] = {"ours": ours, "megatron": megatrons, "chunked": chunked}


def measure() -> list[Row]:
    """Memory and time rows."""
    mib = {
        (name, tokens): _memory_of(name, tokens) / 2**20 for tokens in MEMORY_TARGETS for name in ("ours", "megatron")
    }
    shape = f"bf16, {VOCABULARY} vocabulary, hidden {HIDDEN}, {LABELLED:.0%} labelled"
    rows = [
        Row(
            f"output head, extra memory: ours against Megatron's, {tokens} tokens",
            mib["ours", tokens] / mib["megatron", tokens],
            target=target,
            limit="one tile of logits and the hidden states against all logits",
            note=f"{mib['ours', tokens]:.0f} against {mib['megatron', tokens]:.0f} MiB; {shape}",
        )
        for tokens, target in MEMORY_TARGETS.items()
    ]
    timed = _timed()
    return [
        *rows,
        paired(
            f"output head, CPU time: ours against Megatron's, {TOKENS} tokens",
            timed["ours"].seconds,
            timed["megatron"].seconds,
            # The limit itself: where products are slow, the passes over the logits that ours saves gain nothing.
            target=LABELLED * 4 / 3,
            limit=f"{LABELLED:.0%} of the rows, four products in place of three; passes over the logits come on top",
        ),
        within_limit(
            f"output head, CPU time: ours against chunks of rows with an fp32 backward, {TOKENS} tokens",
            timed["ours"],
            timed["chunked"],
            at_most=True,
            share=NEAR,
            limit="the ratio of the products and softmaxes of both, at this machine's rates in bf16 and in fp32",
        ),
    ]


def _memory_of(method: str, tokens: int) -> int:
    """measure_memory in a fresh process."""
    command = [sys.executable, "-m", "bench.speed.head", "--memory", method, str(tokens)]
    # Blocks over 1 MiB go back to the system at once, so that the peak is of tensors that are alive.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def measure_memory(method: str, tokens: int) -> int:
    """Growth of this process's peak memory over one forward and backward, bytes."""
    with one_rank():
        METHODS[method](make_problem(tokens=16))  # loads kernels
        problem = make_problem(tokens)
        before = resident_bytes()
        reset_peak()
        METHODS[method](problem)
        return peak_bytes() - before


def _timed() -> dict[str, Timed]:
    """CPU seconds of each method, repeats in turn, after checking that they agree; and what they cost at least."""
    timed = {name: Timed() for name in METHODS}
    with one_rank():
        apart = differences(METHODS, partial(make_problem, tokens=256))
        assert max(apart.values()) < ROUNDING, apart
        problem = make_problem()
        for repeat in range(1 + REPEATS):
            costs = _least_seconds(problem)
            for name, method in METHODS.items():
                problem.hidden.grad = problem.weight.grad = None
                spent, _ = cpu_seconds(method, problem)
                if repeat:  # the first warms up
                    timed[name].seconds.append(spent)
                    timed[name].cost.append(costs[name])
    return timed


@torch.no_grad()
def _least_seconds(problem: Problem) -> dict[str, float]:
    """CPU seconds of each method's products and softmaxes alone, at the rates that this machine has now.

    Every method makes two softmaxes over the rows it looks at, one in each direction. Ours and the chunks compute
    logits twice, so that they make four products to Megatron's three; two of the chunks' are in fp32.
    """
    hidden, weight = problem.hidden.squeeze(1)[:CHUNK_ROWS], problem.weight
    wide_hidden, wide_weight = hidden.float(), weight.float()
    logits = wide_hidden @ wide_weight.t()
    seconds = {
        name: median(cpu_seconds(work)[0] for _ in range(UNIT_REPEATS)) * TOKENS / CHUNK_ROWS
        for name, work in {
            "bf16": lambda: hidden @ weight.t(),
            "fp32": lambda: logits @ wide_weight,
            "fp32 of the weight": lambda: logits.t() @ wide_hidden,
            "softmax": lambda: logits.softmax(dim=-1),
        }.items()
    }
    bf16, softmax = seconds["bf16"], seconds["softmax"]
    return {
        "ours": LABELLED * (4 * bf16 + 2 * softmax),
        "megatron": 3 * bf16 + 2 * softmax,
        "chunked": 2 * bf16 + seconds["fp32"] + seconds["fp32 of the weight"] + 2 * softmax,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(measure_memory(sys.argv[2], int(sys.argv[3])))
    else:
        program(__doc__, measure)
