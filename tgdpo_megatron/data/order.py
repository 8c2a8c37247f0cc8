"""Which pairs go into which optimizer step, and which of them to which rank."""

from __future__ import annotations

import numpy as np


def global_batch(iteration: int, *, num_pairs: int, global_batch_size: int, seed: int, shuffle: bool) -> np.ndarray:
    """Pairs of one optimizer step, a function of its number alone, so that resuming needs no state.

    Epochs follow each other without a gap: a step may hold the end of one and the start of the next, so no
    pair is skipped.

    Args:
        iteration: 0-based optimizer step.

    Returns:
        Pair indices. [global_batch_size] int64.
    """
    places = np.arange(iteration * global_batch_size, (iteration + 1) * global_batch_size)
    epochs, within = np.divmod(places, num_pairs)
    batch = np.empty(global_batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(num_pairs) if shuffle else np.arange(num_pairs)
        batch[epochs == epoch] = order[within[epochs == epoch]]
    return batch


def micro_batches(
    pairs: np.ndarray, *, micro_batch_size: int, rank: int, ranks: int, multiple_of: int = 1
) -> list[np.ndarray]:
    """One data-parallel rank's micro-batches of some pairs: every `ranks`-th pair, micro_batch_size at a time.

    Every rank gets the same number of micro-batches, a multiple of `multiple_of` (what an interleaved
    pipeline asks for); where pairs run out, some are short or empty.
    """
    mine = pairs[rank::ranks]
    count = -(-len(pairs) // (micro_batch_size * ranks))
    count = -(-count // multiple_of) * multiple_of
    return [mine[place * micro_batch_size : (place + 1) * micro_batch_size] for place in range(count)]
