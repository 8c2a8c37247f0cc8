"""Which pairs go into which optimizer step, rank and micro-batch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tgdpo_megatron.config import TrainConfig
from tgdpo_megatron.config.constants import round_up


def global_batch(
    iteration: int,
    *,
    num_pairs: int,
    global_batch_size: int,
    seed: int,
    shuffle: bool,
    mix: Mix | None = None,
) -> np.ndarray:
    """Pairs of one optimizer step. They depend only on the arguments, so that resuming needs no state.

    A step may hold the end of one epoch and the start of the next, so no pair is skipped.

    Args:
        iteration: 0-based optimizer step.
        mix: How often each file's pairs are seen. Default: each pair once in an epoch.

    Returns:
        Pair indices. [global_batch_size] int64.
    """
    size = mix.epoch_size if mix else num_pairs
    places = np.arange(iteration * global_batch_size, (iteration + 1) * global_batch_size)
    epochs, within = np.divmod(places, size)
    batch = np.empty(global_batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(size) if shuffle else np.arange(size)
        if mix:
            order = mix.drawn(int(epoch), seed=seed, shuffle=shuffle)[order]
        batch[epochs == epoch] = order[within[epochs == epoch]]
    return batch


@dataclass(frozen=True)
class Mix:
    """How often the pairs of each file are seen.

    Each file is gone through over and over, in an order of its own each time. An epoch takes `weight × pairs` of it and
    the next epoch goes on from there, so that with weight 0.5 the second epoch shows the half that the first left out.

    Attributes:
        sizes: Number of pairs of each file. The pairs of all files stand one after another.
        weights: How many times each file's pairs are seen in an epoch.
    """

    sizes: Sequence[int]
    weights: Sequence[float]

    @property
    def shares(self) -> list[int]:
        """Pairs that an epoch takes of each file."""
        return [round(weight * size) for size, weight in zip(self.sizes, self.weights, strict=True)]

    @property
    def epoch_size(self) -> int:
        """Pairs in one epoch."""
        return sum(self.shares)

    def drawn(self, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
        """Pairs of one epoch, file after file. [epoch_size] int64."""
        starts = np.cumsum([0, *self.sizes])
        return np.concatenate(
            [
                starts[file] + _passes(file, size, epoch * share, share, seed=seed, shuffle=shuffle)
                for file, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True))
            ]
        )


def mix_of(sizes: Sequence[int], weights: Sequence[float] | None) -> Mix | None:
    """The mix that data.weights asks for; None where each pair is seen once in an epoch."""
    return Mix(tuple(sizes), tuple(weights)) if weights is not None else None


def _passes(file: int, size: int, first: int, count: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """`count` pairs of a file, from place `first` of the order in which it is gone through over and over. int64."""
    places = np.arange(first, first + count)
    passes, within = np.divmod(places, max(size, 1))
    pairs = within.copy()
    for number in np.unique(passes) if shuffle else ():
        order = np.random.default_rng([seed, int(number), file]).permutation(size)
        pairs[passes == number] = order[within[passes == number]]
    return pairs


def micro_batches(
    lengths: np.ndarray, settings: TrainConfig, *, ranks: int, multiple_of: int = 1
) -> list[list[np.ndarray]]:
    """Distribute some pairs over the data-parallel ranks and their micro-batches, so that no rank has much more to do.

    The loss is a sum over pairs, so the distribution changes nothing but the time. Pairs are taken longest first. Each
    goes to the rank with the fewest tokens so far, and there to the micro-batch with the fewest. Ties are broken by
    order, so the same pairs are always distributed in the same way.

    Args:
        lengths: Tokens of each pair. [n] int64.
        settings: `micro_batch_size` pairs to a micro-batch, or as many as fit `micro_batch_tokens`.
        ranks: Data-parallel size.
        multiple_of: Every rank gets the same number of micro-batches, a multiple of this number, as an interleaved
            pipeline needs. Where pairs run out, some micro-batches are short or empty.

    Returns:
        For each rank and micro-batch, indices into `lengths`. int64.
    """
    if settings.micro_batch_tokens is None:
        return _of_pairs(lengths, settings.micro_batch_size, ranks, multiple_of)
    return _of_tokens(lengths, settings.micro_batch_tokens, ranks, multiple_of)


def _of_pairs(lengths: np.ndarray, size: int, ranks: int, multiple_of: int) -> list[list[np.ndarray]]:
    """At most `size` pairs in a micro-batch, and the same number of micro-batches for every rank."""
    most = -(-len(lengths) // ranks)
    count = round_up(-(-most // size), multiple_of)
    return [_spread_share(lengths, share, count, max_pairs=size) for share in _spread(lengths, ranks, max_pairs=most)]


def _of_tokens(lengths: np.ndarray, budget: int, ranks: int, multiple_of: int) -> list[list[np.ndarray]]:
    """As few micro-batches as the budget allows, and the same number for every rank."""
    shares = _spread(lengths, ranks)
    full = [_first_fit(lengths, share, budget) for share in shares]
    count = round_up(max(map(len, full)), multiple_of)
    even = [_spread_share(lengths, share, count) for share in shares]
    # Micro-batches of even size keep a pipeline busier. Where one of them would exceed the budget, the packs of the
    # first fit are kept.
    return [
        spread if all(int(lengths[pack].sum()) <= budget for pack in spread) else _with_empty(packs, count)
        for spread, packs in zip(even, full, strict=True)
    ]


def _spread(lengths: np.ndarray, bins: int, *, max_pairs: int | None = None) -> list[np.ndarray]:
    """Put each pair, longest first, into the bin with the fewest tokens that holds fewer than `max_pairs` pairs."""
    content: list[list[int]] = [[] for _ in range(bins)]
    open_bins = [(0, number) for number in range(bins)]  # a heap: fewest tokens first, then the first bin
    order = _longest_first(lengths)
    for place, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        tokens, target = open_bins[0]
        content[target].append(place)
        if len(content[target]) == max_pairs:
            heapq.heappop(open_bins)
        else:
            heapq.heapreplace(open_bins, (tokens + length, target))
    return [np.array(places, dtype=np.int64) for places in content]


def _spread_share(
    lengths: np.ndarray, share: np.ndarray, bins: int, *, max_pairs: int | None = None
) -> list[np.ndarray]:
    """Distribute a rank's share of the pairs over its micro-batches."""
    return [share[places] for places in _spread(lengths[share], bins, max_pairs=max_pairs)]


def _first_fit(lengths: np.ndarray, share: np.ndarray, budget: int) -> list[np.ndarray]:
    """Packs of at most `budget` tokens: each pair, longest first, goes into the first pack that has room.

    A pair that is longer than the budget gets a pack of its own. Training refuses such a pair before it begins.
    """
    content: list[list[int]] = []
    room = _Room(len(share), budget)
    order = share[_longest_first(lengths[share])]
    for place, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        target = room.first(length) if length <= budget else len(content)
        if target == len(content):
            content.append([])
        content[target].append(place)
        room.take(target, length)
    return [np.array(places, dtype=np.int64) for places in content]


class _Room:
    """The free room of packs, all empty at first, as a tree whose nodes know the most room below them.

    The first pack with enough room is found in as many looks as the tree has levels. Packs that are still empty have
    all the room, and come last.

    Args:
        packs: Number of packs, at least as many as are ever needed.
        budget: Room of an empty pack.
    """

    def __init__(self, packs: int, budget: int) -> None:
        self.leaves = 1 << max(packs - 1, 0).bit_length()
        self.most = [budget] * (2 * self.leaves)  # below node i lie nodes 2i and 2i + 1; the last half are the packs

    def first(self, length: int) -> int:
        """The first pack with room for `length` tokens, which must be at most the budget."""
        most, node = self.most, 1
        while node < self.leaves:
            node *= 2
            node += most[node] < length
        return node - self.leaves

    def take(self, pack: int, length: int) -> None:
        """Use `length` tokens of a pack's room."""
        most, node = self.most, pack + self.leaves
        most[node] -= length
        while node > 1:
            left, right = most[node & ~1], most[node | 1]
            node //= 2
            larger = left if left > right else right
            if most[node] == larger:
                break
            most[node] = larger


def _with_empty(packs: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    return [*packs, *(np.empty(0, dtype=np.int64) for _ in range(count - len(packs)))]


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    return np.argsort(-lengths, kind="stable")
