"""Which pairs a step takes, and which of them a rank takes."""

from __future__ import annotations

import numpy as np
import pytest

from tgdpo_megatron.data.order import global_batch, micro_batches


def stream(steps: int, *, num_pairs: int = 7, size: int = 4, seed: int = 42, shuffle: bool = True) -> list[int]:
    """All pairs of the first steps, one after another."""
    drawn = [
        global_batch(step, num_pairs=num_pairs, global_batch_size=size, seed=seed, shuffle=shuffle)
        for step in range(steps)
    ]
    return [int(pair) for batch in drawn for pair in batch]


@pytest.mark.parametrize("size", [1, 4, 7, 20])
def test_each_epoch_holds_every_pair_once_and_epochs_follow_without_a_gap(size: int) -> None:
    drawn = stream(20, size=size)
    for first in range(0, len(drawn) - 6, 7):
        assert sorted(drawn[first : first + 7]) == list(range(7))


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    assert stream(12, size=2) == stream(6, size=4) == stream(1, size=24)


def test_every_epoch_has_an_order_of_its_own() -> None:
    drawn = stream(3, num_pairs=50, size=50)
    epochs = {tuple(drawn[first : first + 50]) for first in (0, 50, 100)}
    assert len(epochs) == 3 and tuple(range(50)) not in epochs


def test_the_seed_decides_the_order() -> None:
    assert stream(5, seed=1) == stream(5, seed=1)
    assert stream(5, seed=1, num_pairs=50) != stream(5, seed=2, num_pairs=50)


def test_without_shuffle_the_file_keeps_its_order() -> None:
    assert stream(4, shuffle=False) == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1]


@pytest.mark.parametrize("pairs", [0, 1, 5, 16, 23])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("multiple_of", [1, 2])
def test_ranks_share_the_pairs_out_without_overlap(pairs: int, size: int, ranks: int, multiple_of: int) -> None:
    picked = np.arange(100, 100 + pairs)
    shares = [
        micro_batches(picked, micro_batch_size=size, rank=rank, ranks=ranks, multiple_of=multiple_of)
        for rank in range(ranks)
    ]
    dealt = [int(pair) for share in shares for batch in share for pair in batch]
    assert sorted(dealt) == picked.tolist()
    counts = {len(share) for share in shares}
    assert len(counts) == 1 and counts.pop() % multiple_of == 0
    assert all(len(batch) <= size for share in shares for batch in share)


def test_no_more_micro_batches_than_needed() -> None:
    assert len(micro_batches(np.arange(12), micro_batch_size=3, rank=0, ranks=2)) == 2
    assert len(micro_batches(np.arange(12), micro_batch_size=3, rank=0, ranks=2, multiple_of=4)) == 4
