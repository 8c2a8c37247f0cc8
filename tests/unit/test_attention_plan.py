"""Every query of every context-parallel rank sees the rows that it must and no other, and the ranks share the work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tgdpo_megatron.data.attention_plan import PADDING_SEGMENT, AttentionPlan, RankRows, Segment, rows_of_rank

Pairs = Sequence[tuple[int, int, int]]
"""Rows of the prompt, of the chosen and of the rejected response of each pair, which shares its prompt."""

ODD_SIZES: dict[str, Pairs] = {
    "one pair": [(5, 7, 4)],
    "pairs of many sizes": [(3, 9, 2), (1, 1, 12), (8, 2, 2), (6, 13, 30)],
    "sequences shorter than the chunks": [(1, 0, 1), (1, 1, 0), (2, 0, 0), (1, 2, 1)],
    "a rejected response of one token, which has no row": [(4, 3, 0)],
    "no pair": [],
}
RANKS = (1, 2, 3, 4)


def segments_of(pairs: Pairs) -> list[Segment]:
    """The prompt with the chosen response, then the rejected response, pair after pair."""
    segments, offset = [], 0
    for prompt, chosen, rejected in pairs:
        segments.append(Segment(offset, prompt + chosen))
        segments.append(Segment(offset + prompt + chosen, rejected, prefix_start=offset, prefix=prompt))
        offset += prompt + chosen + rejected
    return segments


def dense_mask(pairs: Pairs) -> np.ndarray:
    """Which row sees which, from each row's own words: its pair, its part of the pair, and its place in the part."""
    rows = [
        (pair, part, place)
        for pair, sizes in enumerate(pairs)
        for part, size in zip(("prompt", "chosen", "rejected"), sizes, strict=True)
        for place in range(size)
    ]

    def sees(query: tuple[int, str, int], key: tuple[int, str, int]) -> bool:
        if query[0] != key[0]:
            return False
        return key[2] <= query[2] if query[1] == key[1] else key[1] == "prompt"

    return np.array([[sees(query, key) for key in rows] for query in rows], dtype=bool).reshape(len(rows), len(rows))


def shares(pairs: Pairs, ranks: int, *, more: int = 0) -> list[RankRows]:
    """Every rank's share, with `more` rows of padding on each rank than are needed."""
    rows = max(1, -(-sum(map(sum, pairs)) // ranks)) + more
    return [rows_of_rank(segments_of(pairs), rows=rows, rank=rank, ranks=ranks) for rank in range(ranks)]


def mask_of(all_shares: Sequence[RankRows], total: int) -> np.ndarray:
    """Which row of the micro-batch sees which, as the plans of all ranks say. Padding must see nothing but padding."""
    held = len(all_shares[0].rows) + sum(all_shares[0].padding)
    row_at = np.full(held * len(all_shares), -1)
    row_at[all_shares[0].places] = np.arange(total)
    mask = np.zeros((total, total), dtype=bool)
    for rank, share in enumerate(all_shares):
        plan = share.plan
        key_rows = np.arange(held) if plan.key_rows is None else plan.key_rows.numpy()
        assert sum(plan.query_lengths) == held and sum(plan.key_lengths) == len(key_rows)
        first_query = first_key = 0
        for queries, keys in zip(plan.query_lengths, plan.key_lengths, strict=True):
            for query in range(queries):
                row = row_at[rank * held + first_query + query]
                seen = row_at[key_rows[first_key : first_key + keys - queries + query + 1]]
                assert len(set(key_rows[first_key : first_key + keys])) == keys, "a key counts once"
                if row < 0:
                    assert set(seen) == {-1}
                else:
                    mask[row, seen] = True
                    assert (seen >= 0).all()
            first_query, first_key = first_query + queries, first_key + keys
    return mask


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("pairs", ODD_SIZES.values(), ids=ODD_SIZES)
@pytest.mark.parametrize("more", [0, 3, PADDING_SEGMENT + 1])
def test_every_row_is_held_once_and_sees_what_its_definition_says(pairs: Pairs, ranks: int, more: int) -> None:
    found = shares(pairs, ranks, more=more)
    total = sum(map(sum, pairs))
    assert sorted(np.concatenate([share.rows for share in found])) == list(range(total))
    assert (mask_of(found, total) == dense_mask(pairs)).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ranks", RANKS)
def test_random_micro_batches_are_split_into_rows_that_differ_by_one_at_most(ranks: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    pairs = [tuple(generator.integers(1, 40, 3).tolist()) for _ in range(generator.integers(1, 6))]
    found = shares(pairs, ranks)
    held = [len(share.rows) for share in found]
    assert max(held) - min(held) <= 1
    assert (mask_of(found, sum(map(sum, pairs))) == dense_mask(pairs)).all()


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_computes_much_more_attention_than_its_part(ranks: int) -> None:
    """Of pairs as long as real ones, the busiest rank has at most 5 % more scores than the whole divided by the ranks.
    Cut into as many chunks as ranks, the last one alone would have 1.5 and 1.75 times its part."""
    generator = np.random.default_rng(0)
    pairs = [tuple(generator.integers(100, 600, 3).tolist()) for _ in range(4)]
    whole = sum(
        (prompt + chosen) * (prompt + chosen + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2
        for prompt, chosen, rejected in pairs
    )
    for share in shares(pairs, ranks):
        blocks = zip(share.plan.query_lengths, share.plan.key_lengths, strict=True)
        scores = sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in blocks)
        assert scores <= 1.05 * whole / ranks


def test_each_rank_has_an_early_and_a_late_chunk_of_every_long_segment() -> None:
    """Eight rows over two ranks: chunks of two rows, and rank i takes chunks i and 3 − i."""
    first, second = (rows_of_rank([Segment(0, 8)], rows=4, rank=rank, ranks=2) for rank in (0, 1))
    assert first.rows.tolist() == [0, 1, 6, 7] and second.rows.tolist() == [2, 3, 4, 5]
    assert first.plan.query_lengths == (2, 2) and first.plan.key_lengths == (2, 8)
    assert second.plan.query_lengths == (4,) and second.plan.key_lengths == (6,), "chunks that adjoin are one block"
    assert first.places.tolist() == second.places.tolist() == [0, 1, 4, 5, 6, 7, 2, 3]


def test_segments_that_share_nothing_need_no_rows_to_be_picked_on_one_rank() -> None:
    share = rows_of_rank([Segment(0, 4), Segment(4, 3)], rows=7)
    assert share.plan.key_rows is None and share.plan.query_lengths == share.plan.key_lengths == (4, 3)
    assert share.plan.cu_seqlens_q.tolist() == share.plan.cu_seqlens_kv.tolist() == [0, 4, 7]


def test_more_than_two_responses_may_share_one_prompt() -> None:
    """A group: the second, third and fourth response continue rows 0 to 4."""
    group = [Segment(0, 8), *(Segment(start, 3, prefix_start=0, prefix=5) for start in (8, 11, 14))]
    plan = rows_of_rank(group, rows=17).plan
    assert plan.query_lengths == (8, 3, 3, 3) and plan.key_lengths == (8, 8, 8, 8)
    assert plan.key_rows is not None
    assert plan.key_rows.reshape(4, 8)[1:].tolist() == [[0, 1, 2, 3, 4, *range(n, n + 3)] for n in (8, 11, 14)]


def test_the_longest_block_is_known_without_looking_at_the_device() -> None:
    plan = AttentionPlan.of((3, 2), (3, 5), np.array([0, 1, 2, 0, 1, 2, 3, 4]))
    assert plan.most_queries == 3 and plan.most_keys == 5
    assert plan.cu_seqlens_q.tolist() == [0, 3, 5] and plan.cu_seqlens_kv.tolist() == [0, 3, 8]
