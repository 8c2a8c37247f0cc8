"""How many tokens are computed in vain, and how evenly ranks are loaded: counted, not timed.

    python -m bench.counts

Counted from the batches that the product's own data code makes for each optimizer step. *Executed* tokens are
those of all micro-batches of all ranks, padding included; *real* ones those of the sequences alone. A rank's load
is its executed tokens of a step. Deterministic: the same on every machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench.pairs import NO_DATA, real_file, real_pairs, real_tokenizer, ultrafeedback_like
from bench.rows import Row, program, skipped
from tgdpo_megatron.config import Config, TrainConfig
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.order import global_batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.losses import CHOSEN, REJECTED

PAIRS_PER_STEP, STEPS, BUDGET = 128, 16, 4096
SIDES = (CHOSEN, REJECTED)


def measure() -> list[Row]:
    """Padding and balance rows."""
    made_up = ultrafeedback_like(PAIRS_PER_STEP * STEPS)
    rows = _padding(made_up, "UltraFeedback-like") + [_balance(made_up, 8, 1.02), _balance(made_up, 16, 1.05)]
    source = real_file()
    if source is None:
        return [*rows, skipped("executed / real tokens, real pairs", NO_DATA)]
    with tempfile.TemporaryDirectory() as folder:
        real = real_pairs(source, real_tokenizer(source), 2048, Path(folder))
    return rows + _padding(real, "real pairs")


def _padding(data: PreparedPairs, words: str) -> list[Row]:
    """Executed / real tokens, over all steps, with packs of any size and of one size."""
    rows = []
    for name, fixed, ranks, target, limit in (
        ("packs of any size, PP1", False, 1, 1.02, "1; one pair at a time 1.12–1.14, four 1.77"),
        (f"fixed {BUDGET}-token packs, DP2", True, 2, 1.06, "⌈tokens / pack⌉ of the fuller rank: 1.04"),
    ):
        executed = real = 0
        for picked, batches in _steps(data, _config(fixed=fixed), ranks):
            executed += sum(_tokens(share) for share in batches)
            real += int(data.lengths(SIDES)[picked].sum())
        rows.append(
            Row(
                f"executed / real tokens, {words}, {name}",
                executed / real,
                target=target,
                limit=limit,
                note=f"{real:,} tokens in {STEPS} steps",
            )
        )
    return rows


def _balance(data: PreparedPairs, ranks: int, target: float) -> Row:
    """Tokens of the slowest rank over the mean of the ranks, averaged over steps."""
    ratios = []
    for _, batches in _steps(data, _config(fixed=False), ranks):
        loads = [_tokens(share) for share in batches]
        ratios.append(max(loads) / np.mean(loads))
    unbalanced = np.mean([_equal_counts(data.lengths(SIDES)[picked], ranks) for picked in _picks(data)])
    return Row(
        f"slowest rank / mean tokens, UltraFeedback-like, DP{ranks}",
        float(np.mean(ratios)),
        target=target,
        limit=f"1; equal numbers of pairs, in order: {unbalanced:.2f}",
        note=f"mean of {STEPS} steps, worst {max(ratios):.3f}",
        details={"steps": [float(ratio) for ratio in ratios]},
    )


def _equal_counts(lengths: np.ndarray, ranks: int) -> float:
    loads = lengths.reshape(ranks, -1).sum(axis=1)
    return float(loads.max() / loads.mean())


def _config(*, fixed: bool) -> Config:
    train = TrainConfig(global_batch_size=PAIRS_PER_STEP, micro_batch_tokens=BUDGET, fixed_micro_batches=fixed)
    return Config(train=train)


def _picks(data: PreparedPairs) -> list[np.ndarray]:
    """The pairs of each step, as training draws them."""
    return [
        global_batch(step, num_pairs=len(data), global_batch_size=PAIRS_PER_STEP, seed=1, shuffle=True)
        for step in range(STEPS)
    ]


def _steps(data: PreparedPairs, config: Config, ranks: int) -> list[tuple[np.ndarray, list[list[Batch]]]]:
    """For each step: its pairs, and the micro-batches of each rank."""
    cpu = torch.device("cpu")
    return [
        (
            picked,
            [
                rank_batches(data, picked, config, sides=SIDES, rank=rank, ranks=ranks, device=cpu)
                for rank in range(ranks)
            ],
        )
        for picked in _picks(data)
    ]


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(len(batch.tokens) for batch in batches)


if __name__ == "__main__":
    program(__doc__, measure)
