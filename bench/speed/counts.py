"""How many tokens are computed that nobody needs, and how evenly ranks are loaded: counted, not timed.

    python -m bench.speed.counts

Counted from the batches that the product's own data code makes for each optimizer step. *Executed* tokens are those of
all micro-batches of all ranks, padding included. *Real* ones are those of the sequences alone, where a prompt that both
responses of a pair share counts once. A rank's load is its executed tokens of a step. Deterministic: the same on every
machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bench.files import program
from bench.pairs import ultrafeedback_like, with_real_lengths
from bench.rows import Row
from tgdpo_megatron.config import Config, TrainConfig
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.order import global_batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.shared_prompts import tokens_read
from tgdpo_megatron.losses import CHOSEN, REJECTED

PAIRS_PER_STEP, STEPS, BUDGET, LONGEST = 128, 16, 4096, 2048
SIDES = (CHOSEN, REJECTED)


def measure() -> list[Row]:
    """Padding and balance rows."""
    alike = ultrafeedback_like(PAIRS_PER_STEP * STEPS, longest=LONGEST)
    return [
        *_padding(alike, "lengths like UltraFeedback's"),
        _balance(alike, 8, 1.02),
        _balance(alike, 16, 1.05),
        *_padding(with_real_lengths(LONGEST), "lengths of 75 real pairs"),
    ]


def _padding(data: PreparedPairs, words: str) -> list[Row]:
    """Executed / real tokens, over all steps, with packs of any size and of one size."""
    rows = []
    padded = {size: np.mean([_padded(data, picked, size) for picked in _picks(data)]) for size in (1, 4)}
    for name, fixed, ranks, target, limit in (
        (
            "packs of any size",
            False,
            1,
            1.02,
            f"1; prompts computed twice and each pair padded to its longer response {padded[1]:.2f}, four to the "
            f"longest {padded[4]:.2f}",
        ),
        (
            f"packs of exactly {BUDGET} tokens on 2 data-parallel ranks",
            True,
            2,
            1.06,
            f"{_whole_packs(data, 2):.3f}, if pairs could be cut anywhere to fill the packs",
        ),
    ):
        executed = real = 0
        for picked, batches in _steps(data, _config(fixed=fixed), ranks):
            executed += sum(_tokens(share) for share in batches)
            real += int(_real_tokens(data, picked).sum())
        rows.append(
            Row(
                f"tokens computed for each real token: {name}, {words}",
                executed / real,
                target=target,
                limit=limit,
                note=f"{real:,} real tokens in {STEPS} steps of {PAIRS_PER_STEP} pairs",
            )
        )
    return rows


def _padded(data: PreparedPairs, picked: np.ndarray, size: int) -> float:
    """Executed / real tokens if so many pairs at a time were padded to their longest sequence, in order.

    Each response has a prompt of its own there.
    """
    lengths = (np.diff(data.starts).reshape(-1, 2) - 1)[picked]
    parts = [lengths[first : first + size] for first in range(0, len(lengths), size)]
    return float(sum(part.max() * part.size for part in parts) / _real_tokens(data, picked).sum())


def _whole_packs(data: PreparedPairs, ranks: int) -> float:
    """Executed / real tokens if pairs could be cut anywhere: each rank's tokens in whole packs."""
    tokens = [int(_real_tokens(data, picked).sum()) for picked in _picks(data)]
    return float(sum(-(-each // (ranks * BUDGET)) * ranks * BUDGET for each in tokens) / sum(tokens))


def _balance(data: PreparedPairs, ranks: int, target: float) -> Row:
    """Tokens of the slowest rank over the mean of the ranks, averaged over steps."""
    ratios = []
    for _, batches in _steps(data, _config(fixed=False), ranks):
        loads = [_tokens(share) for share in batches]
        ratios.append(max(loads) / np.mean(loads))
    unbalanced = np.mean([_equal_counts(_real_tokens(data, picked), ranks) for picked in _picks(data)])
    return Row(
        f"tokens of the busiest of {ranks} data-parallel ranks against the mean, lengths like UltraFeedback's",
        float(np.mean(ratios)),
        target=target,
        limit=f"1; with equal numbers of pairs, in order, {unbalanced:.2f}",
        note=f"mean of {STEPS} steps, largest {max(ratios):.3f}",
        details={"steps": [float(ratio) for ratio in ratios]},
    )


def _equal_counts(lengths: np.ndarray, ranks: int) -> float:
    loads = lengths.reshape(ranks, -1).sum(axis=1)
    return float(loads.max() / loads.mean())


def _real_tokens(data: PreparedPairs, picked: np.ndarray) -> np.ndarray:
    """Tokens of each pair that must be computed. [n] int64."""
    return tokens_read(data, picked, SIDES, shared_prompts=True)


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
