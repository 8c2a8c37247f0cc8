"""How the time of packing grows: 20,000 pairs at once, far more than any program packs.

    python -m bench.speed.packing

Training packs the pairs of a step, scoring 128 pairs of a rank at a time, and evaluation 1,024 of all ranks.

The pairs are as long as the real ones are. Each is repeated, and a few tokens longer or shorter each time, so that ties
are no more frequent than in data. To count their tokens, both prompts of each are read. The time is CPU time of one
thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import numpy as np

from bench.files import program
from bench.pairs import read_lengths, with_real_lengths
from bench.process import cpu_seconds
from bench.rows import Row
from tgdpo_megatron.config import TrainConfig
from tgdpo_megatron.data.order import micro_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.shared_prompts import tokens_read

PAIRS, BUDGET, ROUNDS = 20_000, 4096, 7
MOST_SECONDS = 0.2
"""A search through all packs for every pair would take some seconds."""
SPREAD = 0.1
"""How much longer or shorter than its model a pair is, at most."""


def measure() -> Iterator[Row]:
    """The row."""
    data = _pairs()
    # Pairs remember whether they share their prompt. Copies look again.
    measured = [cpu_seconds(lambda: _packed(replace(data))) for _ in range(ROUNDS)]
    seconds, packs = [taken for taken, _ in measured], measured[0][1][0]
    yield Row(
        f"seconds to count the tokens of {PAIRS:,} pairs of one rank, of real lengths, and to pack them",
        median(seconds),
        target=MOST_SECONDS,
        limit=f"{MOST_SECONDS} s",
        note=f"{len(packs):,} packs of {BUDGET:,} tokens, {min(seconds):.3f}–{max(seconds):.3f} s of CPU time in "
        f"{ROUNDS} rounds",
        details={"seconds": seconds, "packs": len(packs)},
    )


def _packed(data: PreparedPairs) -> list[list[np.ndarray]]:
    """The packs of all pairs, as tgdpo_megatron.data.batch makes them."""
    lengths = tokens_read(data, np.arange(PAIRS), (0, 1), shared_prompts=True)
    return micro_batches(lengths, TrainConfig(micro_batch_tokens=BUDGET), ranks=1)


def _pairs() -> PreparedPairs:
    """PAIRS pairs; real ones that do not fit a pack are left out."""
    lengths = read_lengths()
    apart = 2 * lengths[:, 0] + lengths[:, 1:].sum(axis=1) - 2
    fitting = lengths[apart * (1 + SPREAD) < BUDGET]
    factors = np.random.default_rng(0).uniform(1 - SPREAD, 1 + SPREAD, (PAIRS, 1))
    return with_real_lengths(BUDGET, lengths=(np.resize(fitting, (PAIRS, 3)) * factors).astype(np.int64))


if __name__ == "__main__":
    program(__doc__, measure)
