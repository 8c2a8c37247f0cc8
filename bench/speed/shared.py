"""What it saves to compute the prompt of a pair once: whole steps and scoring, with shared prompts against without.

    python -m bench.speed.shared

Process CPU seconds at one thread. Both variants are the same program, with `train.shared_prompts` on and off, and run
in turn on the same pairs with the same weights: one, the other, the other again and the first again. Their losses and
token scores are asserted equal. fp32, cached scores, a body-heavy model (bench.ours.BODY). The pairs are as long as
real ones, or have prompts of 1,500 tokens and responses of 300.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.files import program
from bench.ours import Checkpoints, Ours, make_checkpoints
from bench.pairs import with_real_lengths
from bench.process import cpu_seconds, one_rank
from bench.rows import Row
from bench.speed.flops import counted_flops
from bench.speed.limits import COUNTED, Timed, within_limit
from tgdpo_megatron.data.prepare import PreparedPairs

STEP, SCORING = "our TGDPO step, CPU time", "scoring with one frozen model, CPU time"
LONGEST, LOSS_LIMIT, SCORE_LIMIT = 2048, 2e-5, 2e-5
REAL_PAIRS, REAL_BATCHES = 4, 6
LONG_PAIRS, LONG_BATCHES, PROMPT, RESPONSE = 1, 4, 1500, 300
SHARE = 1 / 1.03
"""The target with real lengths is 1.03 times the counted ratio."""
LONG_TARGET = 0.65
"""With long prompts, where the counted ratio is about 0.6. The rest is for what is not counted."""


def measure() -> Iterator[Row]:
    """Two rows for each kind of lengths."""
    with tempfile.TemporaryDirectory() as name, one_rank():
        checkpoints = make_checkpoints(Path(name))
        real = with_real_lengths(LONGEST)
        yield from _rows(real, checkpoints, REAL_PAIRS, REAL_BATCHES, "lengths of 75 real pairs")
        words = f"prompts of {PROMPT:,} tokens, responses of {RESPONSE}"
        yield from _rows(long_prompts(), checkpoints, LONG_PAIRS, LONG_BATCHES, words, target=LONG_TARGET)


def long_prompts() -> PreparedPairs:
    """Pairs whose prompts are much longer than their responses."""
    lengths = np.tile([PROMPT, RESPONSE, RESPONSE], (LONG_PAIRS * LONG_BATCHES, 1))
    return with_real_lengths(PROMPT + RESPONSE, lengths=lengths)


def _rows(
    data: PreparedPairs,
    checkpoints: Checkpoints,
    size: int,
    number: int,
    words: str,
    *,
    target: float | None = None,
) -> Iterator[Row]:
    """The step and scoring, over `number` batches of `size` pairs. Without a target, it follows from the count."""
    batches = [list(range(first, first + size)) for first in range(0, size * number, size)]
    shared, apart = (Ours(data, checkpoints, cached=True, shared_prompts=shared) for shared in (True, False))
    for one in (shared, apart):
        one.cache_scores([pair for batch in batches for pair in batch])
    assert shared.scores and apart.scores
    expected = apart.scores.values
    error = max(float(np.abs(scores - expected[role]).max()) for role, scores in shared.scores.values.items())
    assert error <= SCORE_LIMIT, f"token scores differ by {error:.1e}"

    of_shared, of_apart, losses = _in_turn(shared.step, apart.step, batches, rounds=1)
    difference = max(abs(one - other) for one, other in losses)
    assert difference <= LOSS_LIMIT, f"losses differ by {difference:.1e}"
    note = f"losses equal to {difference:.0e}"
    yield _row(f"{STEP}: prompts shared against computed twice, {words}", of_shared, of_apart, target, note)

    frozen = shared.frozen_model("reference")
    score = (partial(one.score, frozen) for one in (shared, apart))
    of_shared, of_apart, _ = _in_turn(*score, batches, rounds=2)  # shorter, and so measured more often
    note = f"token scores equal to {error:.0e}"
    yield _row(f"{SCORING}: prompts shared against computed twice, {words}", of_shared, of_apart, target, note)


def _row(name: str, shared: Timed, apart: Timed, target: float | None, note: str) -> Row:
    row = within_limit(name, shared, apart, at_most=True, share=SHARE, limit=COUNTED, note=note)
    return row if target is None else replace(row, target=target, limit=COUNTED)


def _in_turn(
    shared: Callable[[list[int]], Any], apart: Callable[[list[int]], Any], batches: list[list[int]], *, rounds: int
) -> tuple[Timed, Timed, list[tuple[Any, Any]]]:
    """Time two programs on each batch, one before and after the other. Gives their results too."""
    both = shared, apart
    timed, results = (Timed(), Timed()), []
    for batch in batches:
        cost = [counted_flops(run, batch) for run in both]  # warms up
        found: list[Any] = [None, None]
        for which in (0, 1, 1, 0) * rounds:
            spent, found[which] = cpu_seconds(both[which], batch)
            timed[which].seconds.append(spent)
            timed[which].cost.append(cost[which])
        results.append((found[0], found[1]))
    return timed[0].mean_of_two(), timed[1].mean_of_two(), results


if __name__ == "__main__":
    program(__doc__, measure)
