"""Which pairs go into which optimizer step, and which of them to which rank and micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tgdpo_megatron.config import TrainConfig


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
    lengths: np.ndarray, settings: TrainConfig, *, ranks: int, multiple_of: int = 1
) -> list[list[np.ndarray]]:
    """Cut some pairs into micro-batches for every data-parallel rank, so that none has much more to do.

    The loss is a sum over pairs, so where a pair goes changes nothing but the time. Longest first, to the rank
    and then the micro-batch with the fewest tokens so far. Ties go by order: the same pairs give the same cut.

    Args:
        lengths: Tokens of each pair. [n] int64.
        settings: `micro_batch_size` pairs to a micro-batch, or as many as fit `micro_batch_tokens`.
        ranks: Data-parallel size.
        multiple_of: Every rank gets the same number of micro-batches, a multiple of this (what an interleaved
            pipeline asks for); where pairs run out, some are short or empty.

    Returns:
        For each rank, for each micro-batch: places in `lengths`. int64.
    """
    if settings.micro_batch_tokens is None:
        most = -(-len(lengths) // ranks)
        count = _round_up(-(-most // settings.micro_batch_size), multiple_of)
        shares = _spread(lengths, ranks, most=most)
        return [_within(lengths, share, count, most=settings.micro_batch_size) for share in shares]
    shares = _spread(lengths, ranks)
    packs = [_fill(lengths, share, settings.micro_batch_tokens) for share in shares]
    count = _round_up(max(map(len, packs)), multiple_of)
    evened = [_within(lengths, share, count) for share in shares]
    return [
        even if _fits(lengths, even, settings.micro_batch_tokens) else _extend(full, count)
        for even, full in zip(evened, packs, strict=True)
    ]


def _spread(lengths: np.ndarray, bins: int, *, most: int | None = None) -> list[np.ndarray]:
    """Longest first, each to the bin with the fewest tokens that holds fewer than `most` pairs."""
    content: list[list[int]] = [[] for _ in range(bins)]
    tokens = np.zeros(bins)
    for place in _longest_first(lengths):
        target = int(np.argmin(tokens))
        content[target].append(int(place))
        tokens[target] += lengths[place]
        if most is not None and len(content[target]) == most:
            tokens[target] = np.inf
    return [np.array(places, dtype=np.int64) for places in content]


def _within(lengths: np.ndarray, share: np.ndarray, bins: int, *, most: int | None = None) -> list[np.ndarray]:
    """A rank's share spread over its micro-batches."""
    return [share[places] for places in _spread(lengths[share], bins, most=most)]


def _fill(lengths: np.ndarray, share: np.ndarray, budget: int) -> list[np.ndarray]:
    """As few packs of at most `budget` tokens as first-fit, longest first, finds."""
    content: list[list[int]] = []
    room: list[int] = []
    for place in share[_longest_first(lengths[share])]:
        target = next((pack for pack, left in enumerate(room) if left >= lengths[place]), len(room))
        if target == len(room):
            content.append([])
            room.append(budget)
        content[target].append(int(place))
        room[target] -= int(lengths[place])
    return [np.array(places, dtype=np.int64) for places in content]


def _fits(lengths: np.ndarray, packs: Sequence[np.ndarray], budget: int) -> bool:
    return all(int(lengths[pack].sum()) <= budget for pack in packs)


def _extend(packs: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    return [*packs, *(np.empty(0, dtype=np.int64) for _ in range(count - len(packs)))]


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    return np.argsort(-lengths, kind="stable")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
