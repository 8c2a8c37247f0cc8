"""How evenly context-parallel ranks share the operations of a micro-batch: counted, not timed.

    python -m bench.speed.context

Counted from the batches that the product's own data code makes for each rank. A row takes a product with every weight
of the layers, padding too. Attention takes two products for every key that a query sees. A label takes a product with
the output matrix, on the rank that holds the row that predicts it. Backward takes two products for each of forward, on
the same rank, so forward alone is counted. The ranks meet in every layer, where they gather keys and values, so what
counts is the busiest rank of every micro-batch. Sizes are those of Llama-3-8B. Deterministic: the same on every
machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bench.files import program
from bench.pairs import with_real_lengths
from bench.rows import Row
from tgdpo_megatron.config import Config, ParallelConfig, TrainConfig
from tgdpo_megatron.data.attention_plan import AttentionPlan
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.order import global_batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.losses import CHOSEN, REJECTED

PAIRS_PER_STEP, STEPS, BUDGET, LONGEST = 128, 4, 4096, 2048
RANKS, TARGET = (2, 4), 1.05
LAYERS, HIDDEN, FFN, KEYS, VOCABULARY = 32, 4096, 14336, 1024, 128256
"""Of Llama-3-8B. KEYS is the width of all key heads together."""


def measure() -> list[Row]:
    """A row for each number of ranks."""
    data = with_real_lengths(LONGEST)
    whole = [operations(batch) for (batch,) in shares(data, 1)]
    return [_row(data, ranks, whole) for ranks in RANKS]


def _row(data: PreparedPairs, ranks: int, whole: Sequence[int]) -> Row:
    found = [[operations(batch) for batch in of_ranks] for of_ranks in shares(data, ranks)]
    assert len(found) == len(whole)
    ratios = [ranks * max(counts) / alone for counts, alone in zip(found, whole, strict=True)]
    return Row(
        f"operations of the busiest of {ranks} context-parallel ranks, against 1/{ranks} of the whole",
        ranks * sum(map(max, found)) / sum(whole),
        target=TARGET,
        limit="1: every rank has as much to do",
        note=f"over {len(whole)} micro-batches of up to {BUDGET:,} tokens, lengths of 75 real pairs; the largest of "
        f"one micro-batch {max(ratios):.3f}",
    )


def shares(data: PreparedPairs, ranks: int) -> list[tuple[Batch, ...]]:
    """For each micro-batch of some steps, what each context-parallel rank holds of it."""
    config = Config(
        parallel=ParallelConfig(context_parallel_size=ranks),
        train=TrainConfig(global_batch_size=PAIRS_PER_STEP, micro_batch_tokens=BUDGET),
    )
    found: list[tuple[Batch, ...]] = []
    for step in range(STEPS):
        picked = global_batch(step, num_pairs=len(data), global_batch_size=PAIRS_PER_STEP, seed=1, shuffle=True)
        held = [_held(data, picked, config, context_rank) for context_rank in range(ranks)]
        found += zip(*held, strict=True)
    return found


def _held(data: PreparedPairs, picked: np.ndarray, config: Config, context_rank: int) -> list[Batch]:
    return rank_batches(
        data,
        picked,
        config,
        sides=(CHOSEN, REJECTED),
        rank=0,
        ranks=1,
        device=torch.device("cpu"),
        context_rank=context_rank,
    )


def operations(batch: Batch) -> int:
    """Operations of one forward pass over what a rank holds of a micro-batch."""
    layer = 2 * HIDDEN * (HIDDEN + KEYS) + 3 * HIDDEN * FFN
    body = LAYERS * (layer * len(batch.tokens) + 2 * HIDDEN * keys_seen(batch.plan))
    return 2 * (body + HIDDEN * VOCABULARY * len(batch.labels))


def keys_seen(plan: AttentionPlan) -> int:
    """Keys that each query of a plan sees, itself included, added up over its queries."""
    return sum(
        queries * (keys - queries) + queries * (queries + 1) // 2
        for queries, keys in zip(plan.query_lengths, plan.key_lengths, strict=True)
    )


if __name__ == "__main__":
    program(__doc__, measure)
