"""The distributed head at the size of Llama-3-8B's on a GPU: its rate, its memory, and both against Megatron's own
output layer and cross-entropy. And what it costs to keep the fp32 sums of its products, against 16-bit logits.

    python -m bench.gpu.head

8,192 tokens, hidden 4,096, vocabulary 128,256, bf16; per-token upstream gradients are random, and log-probs and
gradients of both are compared first. Rate: the products that are needed, (2 + 4) T H V and 2 T H V to have the
logits again, over the time, as a share of the matrix rate measured in the same process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch

from bench.gpu import device
from bench.gpu.rate import matrix_rate
from bench.heads import LABELLED, ROUNDING, Problem, differences, make_problem, megatrons, ours, rounded
from bench.process import one_rank
from bench.rows import Row, paired
from tgdpo_megatron.model.products import product

TOKENS, HIDDEN, VOCABULARY, REPEATS = (256, 64, 512, 2) if device.REHEARSAL else (8192, 4096, 128256, 7)
AGREEMENT_TOKENS = 256
COMPARED = {"ours": ours, "megatron": megatrons}
TIMED = COMPARED | {"rounded": rounded}


def problem(labelled: float = 1.0, tokens: int = TOKENS) -> Problem:
    return make_problem(tokens, width=HIDDEN, vocabulary=VOCABULARY, labelled=labelled, device=device.HERE)


def measure() -> Iterator[Row]:
    with one_rank():
        rate = matrix_rate()
        apart = differences(COMPARED, partial(problem, LABELLED, AGREEMENT_TOKENS))
        yield Row(
            "head, largest difference of log-probs and gradients, ours − Megatron's",
            max(apart.values()),
            target=ROUNDING,
            limit="relative to the largest value; bf16 products in another order",
            note=f"{AGREEMENT_TOKENS} tokens, random upstream gradients",
            details=apart,
        )
        for labelled in (1.0, LABELLED):
            yield from _rows(labelled, rate)


def _rows(labelled: float, rate: float) -> Iterator[Row]:
    asked = problem(labelled)
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    extra: dict[str, int] = {}
    for repeat in range(1 + REPEATS):
        for name, method in TIMED.items():
            asked.hidden.grad = asked.weight.grad = None
            if repeat == 1:
                before = device.allocated()
                most, _ = device.peak(method, asked)
                extra[name] = most - before
                asked.hidden.grad = asked.weight.grad = None
            spent, _ = device.timed(method, asked)
            if repeat:  # the first warms up
                seconds[name].append(spent)
    rows = len(asked.predictors)
    operations = 8 * rows * HIDDEN * VOCABULARY
    words = f"{TOKENS} tokens, {rows / TOKENS:.0%} labelled"
    yield Row(
        f"head, rate / matrix rate, {words}",
        operations / median(seconds["ours"]) / rate,
        target=0.70,
        at_most=False,
        limit="1",
        note=f"{1e3 * median(seconds['ours']):.1f} ms, forward and backward",
        details={"seconds": seconds["ours"], "operations": operations, "matrix rate": rate},
    )
    yield Row(
        f"head, extra memory, GiB, {words}",
        extra["ours"] / device.GIB,
        target=1.2,
        limit="beside hidden states, weight and weight gradient",
        note=f"Megatron's: {extra['megatron'] / device.GIB:.2f} GiB; ours with 16-bit logits: "
        f"{extra['rounded'] / device.GIB:.2f} GiB",
        details=extra,
    )
    yield paired(f"head, time, ours / Megatron's, {words}", seconds["ours"], seconds["megatron"])
    yield paired(
        f"head, time, fp32 sums of products / 16-bit logits, {words}",
        seconds["ours"],
        seconds["rounded"],
        target=1.10,
        limit="1.05 on an H200, where all tokens have labels: 13 bytes more a logit, in 57 ps, at 4.8 TB/s",
        note="forward and backward" if _sums_are_kept(asked) else "this torch gives no sums: both sides are the same",
    )


def _sums_are_kept(asked: Problem) -> bool:
    return product(asked.hidden.detach()[:1, 0], asked.weight.detach().t()).dtype == torch.float32


if __name__ == "__main__":
    device.program(__doc__, measure)
