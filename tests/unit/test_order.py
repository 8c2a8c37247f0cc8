"""Which pairs a step takes, and which of them a rank takes."""

from __future__ import annotations

import numpy as np
import pytest

from tgdpo_megatron.config import TrainConfig
from tgdpo_megatron.data.order import Mix, global_batch, micro_batches, mix_of


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


# ---------------------------------------------------------------- files with weights


MIX = Mix(sizes=(4, 6, 1), weights=(2, 0.5, 3))
"""Pairs 0-3 twice, half of pairs 4-9, and pair 10 three times: epochs of 8 + 3 + 3."""


def epochs_of(mix: Mix, count: int, *, seed: int = 42, shuffle: bool = True, size: int = 5) -> list[list[int]]:
    """The pairs of the first epochs, drawn in steps of `size`."""
    steps = -(-count * mix.epoch_size // size)
    drawn = [
        global_batch(step, num_pairs=11, global_batch_size=size, seed=seed, shuffle=shuffle, mix=mix)
        for step in range(steps)
    ]
    pairs = np.concatenate(drawn).tolist()
    return [pairs[epoch * mix.epoch_size : (epoch + 1) * mix.epoch_size] for epoch in range(count)]


def test_an_epoch_shows_the_pairs_of_each_file_as_often_as_its_weight_says() -> None:
    assert MIX.epoch_size == 14
    for epoch in epochs_of(MIX, 6):
        assert sorted(pair for pair in epoch if pair < 4) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len({pair for pair in epoch if 4 <= pair < 10}) == 3
        assert epoch.count(10) == 3


def test_the_half_that_an_epoch_leaves_out_comes_in_the_next() -> None:
    epochs = epochs_of(MIX, 20)
    halves = [{pair for pair in epoch if 4 <= pair < 10} for epoch in epochs]
    for first, second in zip(halves[0::2], halves[1::2], strict=True):
        assert first | second == set(range(4, 10))
    assert len({frozenset(half) for half in halves[0::2]}) > 1, "by chance, not always the same half"


def test_every_epoch_of_a_mix_has_an_order_of_its_own_that_the_seed_decides() -> None:
    epochs = epochs_of(MIX, 4)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs == epochs_of(MIX, 4, size=14) != epochs_of(MIX, 4, seed=1)
    assert any(epoch[:8] != [pair for pair in epoch[:8] if pair < 4] for epoch in epochs), "files are mixed"


def test_without_shuffle_a_mix_keeps_the_order_of_the_files() -> None:
    first, second = epochs_of(MIX, 2, shuffle=False)
    assert first == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 10, 10, 10]
    assert second == [0, 1, 2, 3, 0, 1, 2, 3, 7, 8, 9, 10, 10, 10]


def test_weights_of_one_show_each_pair_once() -> None:
    for epoch in epochs_of(Mix((4, 6, 1), (1, 1, 1)), 3):
        assert sorted(epoch) == list(range(11))
    assert mix_of([4, 6, 1], None) is None


LENGTHS = np.random.default_rng(3).integers(20, 400, 23)


@pytest.mark.parametrize("pairs", [0, 1, 5, 16, 23])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("multiple_of", [1, 2])
@pytest.mark.parametrize("how", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 450}])
def test_ranks_share_the_pairs_out_without_overlap(
    pairs: int, ranks: int, multiple_of: int, how: dict[str, int]
) -> None:
    shares = micro_batches(LENGTHS[:pairs], TrainConfig(**how), ranks=ranks, multiple_of=multiple_of)
    dealt = [int(place) for share in shares for batch in share for place in batch]
    assert sorted(dealt) == list(range(pairs))
    counts = {len(share) for share in shares}
    assert len(counts) == 1 and counts.pop() % multiple_of == 0


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_micro_batches_of_pairs_hold_no_more_pairs_than_asked(ranks: int) -> None:
    shares = micro_batches(LENGTHS, TrainConfig(micro_batch_size=3), ranks=ranks)
    assert max(len(batch) for share in shares for batch in share) == 3


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_skewed_lengths_fill_no_micro_batch_beyond_its_pairs(ranks: int) -> None:
    """One pair as long as all others: by tokens alone the short ones would all go together."""
    lengths = np.array([1100, *[100] * 11])
    shares = micro_batches(lengths, TrainConfig(micro_batch_size=2), ranks=ranks)
    assert [[len(batch) for batch in share] for share in shares] == [[2] * (6 // ranks)] * ranks


@pytest.mark.parametrize("budget", [400, 420, 450, 520, 1000, 10000])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_micro_batches_of_tokens_stay_within_their_budget(ranks: int, budget: int) -> None:
    shares = micro_batches(LENGTHS, TrainConfig(micro_batch_tokens=budget), ranks=ranks)
    assert max(int(LENGTHS[batch].sum()) for share in shares for batch in share) <= budget


def test_a_cut_that_cannot_be_evened_within_the_budget_stays_full() -> None:
    """First fit finds 7+8, 6+6+4; evened out, longest first: 8+6+4 = 18 and 7+6."""
    (share,) = micro_batches(np.array([7, 6, 6, 4, 8]), TrainConfig(micro_batch_tokens=16), ranks=1)
    assert sorted(sorted(batch.tolist()) for batch in share) == [[0, 4], [1, 2, 3]]


def test_micro_batches_of_one_rank_are_evened_out_where_the_budget_allows() -> None:
    """Two packs of at most 100: first fit would make 90 and 30."""
    lengths = np.array([30, 30, 30, 30])
    (share,) = micro_batches(lengths, TrainConfig(micro_batch_tokens=100), ranks=1)
    assert [int(lengths[batch].sum()) for batch in share] == [60, 60]


@pytest.mark.parametrize("ranks", [2, 4])
def test_counted_pairs_are_balanced_over_ranks_and_micro_batches(ranks: int) -> None:
    lengths = np.minimum(np.random.default_rng(6).lognormal(6.9, 0.5, 64), 4000).astype(int)
    shares = micro_batches(lengths, TrainConfig(micro_batch_size=4), ranks=ranks)
    tokens = [sum(int(lengths[batch].sum()) for batch in share) for share in shares]
    assert max(tokens) / np.mean(tokens) <= 1.02
    for share in shares:
        within = [int(lengths[batch].sum()) for batch in share]
        assert max(within) / np.mean(within) <= 1.3
        in_order = [int(lengths[np.concatenate(share)][first : first + 4].sum()) for first in range(0, 64 // ranks, 4)]
        assert max(within) <= max(in_order)


def test_no_more_micro_batches_than_needed() -> None:
    twelve = LENGTHS[:12]
    assert len(micro_batches(twelve, TrainConfig(micro_batch_size=3), ranks=2)[0]) == 2
    assert len(micro_batches(twelve, TrainConfig(micro_batch_size=3), ranks=2, multiple_of=4)[0]) == 4
    assert len(micro_batches(twelve, TrainConfig(micro_batch_tokens=int(twelve.sum())), ranks=1)[0]) == 1


def test_the_same_pairs_are_always_cut_in_the_same_way() -> None:
    cuts = [micro_batches(LENGTHS, TrainConfig(micro_batch_tokens=900), ranks=2) for _ in range(2)]
    assert [[batch.tolist() for batch in share] for share in cuts[0]] == [
        [batch.tolist() for batch in share] for share in cuts[1]
    ]


@pytest.mark.parametrize(("ranks", "limit"), [(8, 1.02), (16, 1.05)])
def test_no_rank_has_much_more_than_the_mean_to_do(ranks: int, limit: float) -> None:
    lengths = np.minimum(np.random.default_rng(5).lognormal(6.9, 0.5, 128), 4000).astype(int)
    shares = micro_batches(lengths, TrainConfig(micro_batch_tokens=4096), ranks=ranks)
    tokens = [sum(int(lengths[batch].sum()) for batch in share) for share in shares]
    assert max(tokens) / np.mean(tokens) <= limit


# ---------------------------------------------------------------- the same packs as the plain rules, sooner


def plain_spread(lengths: list[int], bins: int, most: int | None = None) -> list[list[int]]:
    """Each pair, longest first, into the bin with the fewest tokens that has room for a pair, found by looking at all.

    Written here once more, from the words of the rule.
    """
    content: list[list[int]] = [[] for _ in range(bins)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        candidates = [number for number in range(bins) if most is None or len(content[number]) < most]
        content[min(candidates, key=lambda number: sum(lengths[other] for other in content[number]))].append(place)
    return content


def plain_first_fit(lengths: list[int], share: list[int], budget: int) -> list[list[int]]:
    """Each pair of a share, longest first, into the first pack with room, found by looking at all."""
    packs: list[list[int]] = []
    for place in sorted(share, key=lambda place: -lengths[place]):
        for pack in packs:
            if sum(lengths[other] for other in pack) + lengths[place] <= budget:
                pack.append(place)
                break
        else:
            packs.append([place])
    return packs


def plain_cut(lengths: list[int], settings: TrainConfig, ranks: int) -> list[list[list[int]]]:
    """The whole rule of micro_batches, of the two above."""

    def of_share(share: list[int], count: int, most: int | None = None) -> list[list[int]]:
        return [[share[place] for place in bin] for bin in plain_spread([lengths[p] for p in share], count, most)]

    if settings.micro_batch_tokens is None:
        most = -(-len(lengths) // ranks)
        count = -(-most // settings.micro_batch_size)
        return [of_share(share, count, settings.micro_batch_size) for share in plain_spread(lengths, ranks, most)]
    budget, shares = settings.micro_batch_tokens, plain_spread(lengths, ranks)
    full = [plain_first_fit(lengths, share, budget) for share in shares]
    count = max(map(len, full))
    even = [of_share(share, count) for share in shares]
    fits = [all(sum(lengths[place] for place in batch) <= budget for batch in batches) for batches in even]
    return [
        spread if fitting else packs + [[]] * (count - len(packs))
        for spread, packs, fitting in zip(even, full, fits, strict=True)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_pairs_are_distributed_exactly_as_by_looking_at_every_rank_and_pack(seed: int) -> None:
    """Few different lengths, so that many tie; budgets that some pairs exceed; packs that are full to the token."""
    random = np.random.default_rng(seed)
    lengths = random.integers(18, 18 + random.choice([3, 12, 300]), random.integers(0, 150))
    longest = int(lengths.max(initial=18))
    ranks = int(random.choice([1, 2, 3, 8]))
    budget = int(random.choice([longest - 2, longest, 2 * longest + 1, 7 * longest]))
    for settings in (
        TrainConfig(micro_batch_tokens=budget),
        TrainConfig(micro_batch_size=int(random.integers(1, 9))),
    ):
        found = micro_batches(lengths, settings, ranks=ranks)
        expected = plain_cut(lengths.tolist(), settings, ranks)
        assert [[batch.tolist() for batch in share] for share in found] == expected
