"""How long it takes to put many pairs into packs: whole data sets are packed to be scored and evaluated.

    python -m bench.speed.packing

The pairs are as long as the real ones are. Each is repeated, and a few tokens longer or shorter each time, so that ties
are no more frequent than in data. The time is CPU time of one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import numpy as np

from bench.files import program
from bench.pairs import read_lengths
from bench.process import cpu_seconds
from bench.rows import Row
from tgdpo_megatron.config import TrainConfig
from tgdpo_megatron.data.order import micro_batches

PAIRS, BUDGET, ROUNDS = 20_000, 4096, 7
MOST_SECONDS = 0.2
"""Within a step of a large model nobody sees it; a search through all packs for every pair takes some seconds."""
SPREAD = 0.1
"""How much longer or shorter than its model a pair is, at most."""


def measure() -> Iterator[Row]:
    """The row."""
    lengths = _lengths()
    settings = TrainConfig(micro_batch_tokens=BUDGET)
    measured = [cpu_seconds(lambda: micro_batches(lengths, settings, ranks=1)) for _ in range(ROUNDS)]
    seconds, packs = [taken for taken, _ in measured], measured[0][1][0]
    yield Row(
        f"seconds to pack {PAIRS:,} pairs of one rank, of real lengths",
        median(seconds),
        target=MOST_SECONDS,
        limit=f"{MOST_SECONDS} s",
        note=f"{len(packs):,} packs of {BUDGET:,} tokens, {min(seconds):.3f}–{max(seconds):.3f} s of CPU time in "
        f"{ROUNDS} rounds",
        details={"seconds": seconds, "packs": len(packs)},
    )


def _lengths() -> np.ndarray:
    """Tokens of each pair that the model reads; pairs that do not fit a pack are left out. [PAIRS] int64."""
    prompts, *responses = read_lengths().T
    pairs = 2 * prompts + sum(responses) - 2
    factors = np.random.default_rng(0).uniform(1 - SPREAD, 1 + SPREAD, PAIRS)
    return (np.resize(pairs[pairs * (1 + SPREAD) < BUDGET], PAIRS) * factors).astype(np.int64)


if __name__ == "__main__":
    program(__doc__, measure)
