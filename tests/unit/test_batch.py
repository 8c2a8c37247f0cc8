"""The flat batch: labels shifted once, positions restarted, segments apart; shared prompts, and shares of
context-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tgdpo_megatron.config import Config, ParallelConfig, TrainConfig
from tgdpo_megatron.data.batch import Batch, make_batch, rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.shared_prompts import tokens_read
from tgdpo_megatron.losses import CHOSEN, REJECTED


@pytest.fixture
def data(prepared_by_hand: Callable[..., Any]) -> PreparedPairs:
    """Three pairs; every token id occurs once, so that a label says where it came from."""
    return prepared_by_hand(
        [
            ([1, 2, 3], [4, 5], [6]),
            ([11, 12], [13, 14, 15], [16, 17]),
            ([21], [22], [23, 24, 25]),
        ]
    )


def test_a_batch_by_hand(data: PreparedPairs) -> None:
    """The last token of each sequence predicts nothing and is left out; row 2 (token 3) predicts label 4, …."""
    batch = make_batch(data, [0])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.plan.query_lengths == (4, 3) and batch.plan.cu_seqlens_q.tolist() == [0, 4, 7]
    assert batch.predictors.tolist() == [2, 3, 6] and batch.labels.tolist() == [4, 5, 6]
    assert batch.pairs.pair.tolist() == [0, 0, 0] and batch.pairs.side.tolist() == [CHOSEN, CHOSEN, REJECTED]
    assert batch.pairs.num_pairs == 1 and batch.samples == (0,) and batch.plan.most_keys == 4


def test_each_label_is_the_token_right_after_its_row_in_the_same_sequence(data: PreparedPairs) -> None:
    batch = make_batch(data, [2, 0, 1])
    ends = batch.plan.cu_seqlens_q.long()
    segments = torch.bucketize(batch.predictors, ends[1:], right=True)
    for row, label, segment in zip(batch.predictors.tolist(), batch.labels.tolist(), segments.tolist(), strict=True):
        sequence = data.sequence((2, 0, 1)[segment // 2], segment % 2).tolist()
        place = row - int(ends[segment])
        assert int(batch.tokens[row]) == sequence[place] and label == sequence[place + 1]


def test_the_labels_of_a_batch_are_all_response_tokens_and_no_other(data: PreparedPairs) -> None:
    assert make_batch(data, [1, 2]).labels.tolist() == [13, 14, 15, 16, 17, 22, 23, 24, 25]


@pytest.mark.parametrize("samples", [[], [0, 1]])
def test_a_batch_of_a_given_size_has_it_and_its_padding_is_apart(samples: list[int], data: PreparedPairs) -> None:
    batch, plain = make_batch(data, samples, size=600), make_batch(data, samples)
    used = len(plain.tokens) if samples else 0
    assert len(batch.tokens) == sum(batch.plan.query_lengths) == int(batch.plan.cu_seqlens_q[-1]) == 600
    assert batch.tokens[:used].tolist() == plain.tokens[:used].tolist() and not batch.tokens[used:].any()
    assert batch.plan.query_lengths[: 2 * len(samples)] == (plain.plan.query_lengths if samples else ())
    assert max(batch.plan.query_lengths[2 * len(samples) :]) <= 256
    assert batch.labels.tolist() == plain.labels.tolist() and batch.predictors.tolist() == plain.predictors.tolist()


def test_a_batch_smaller_than_its_pairs_is_refused(data: PreparedPairs) -> None:
    with pytest.raises(ValueError, match="do not fit a batch of 5"):
        make_batch(data, [0, 1], size=5)


def test_pair_and_side_follow_the_labels(data: PreparedPairs) -> None:
    batch = make_batch(data, [1, 2])
    assert batch.pairs.pair.tolist() == [0] * 5 + [1] * 4
    assert batch.pairs.side.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1]
    assert batch.pairs.lengths().tolist() == [[3, 2], [1, 3]]


def test_positions_restart_in_every_segment(data: PreparedPairs) -> None:
    batch = make_batch(data, [0, 1, 2], align=16)
    expected = np.concatenate([np.arange(length) for length in batch.plan.query_lengths])
    assert batch.positions.tolist() == expected.tolist()
    assert batch.plan.cu_seqlens_q.tolist() == [0, *np.cumsum(batch.plan.query_lengths)]


@pytest.mark.parametrize("align", [2, 4, 8])
def test_alignment_padding_is_a_segment_of_its_own_without_labels(align: int, data: PreparedPairs) -> None:
    plain, padded = make_batch(data, [0, 1]), make_batch(data, [0, 1], align=align)
    assert len(plain.tokens) == 14 and len(padded.tokens) % align == 0 and len(padded.tokens) < 14 + align
    assert padded.tokens[:14].tolist() == plain.tokens.tolist()
    assert padded.plan.query_lengths[:4] == plain.plan.query_lengths
    assert sum(padded.plan.query_lengths[4:]) == padded.padding == len(padded.tokens) - 14
    assert padded.predictors.tolist() == plain.predictors.tolist() and padded.labels.tolist() == plain.labels.tolist()


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_fp8_fills_every_micro_batch_of_every_rank_to_what_it_divides_and_counts_it(
    recipe: str, data: PreparedPairs
) -> None:
    train = TrainConfig(fp8="hybrid", fp8_recipe=recipe, micro_batch_size=1)
    config = Config(parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), train=train)
    cut = partial(rank_batches, data, np.arange(3), sides=(CHOSEN, REJECTED), ranks=2, device=torch.device("cpu"))
    for rank in (0, 1):
        plain = cut(Config(train=train.model_copy(update={"fp8": None})), rank=rank)
        for with_fp8, without in zip(cut(config, rank=rank), plain, strict=True):
            assert len(with_fp8.tokens) == {"blockwise": 256}.get(recipe, 32)
            real = sum(without.plan.query_lengths) if without.samples else 0
            assert with_fp8.padding == len(with_fp8.tokens) - real
            assert with_fp8.labels.tolist() == without.labels.tolist()


def test_a_batch_that_is_aligned_already_gets_no_padding(data: PreparedPairs) -> None:
    assert make_batch(data, [0, 1], align=7).plan.query_lengths == make_batch(data, [0, 1]).plan.query_lengths


@pytest.mark.parametrize("align", [1, 4])
def test_an_empty_batch_holds_padding_alone(align: int, data: PreparedPairs) -> None:
    batch = make_batch(data, [], align=align)
    assert len(batch.tokens) == align and batch.plan.query_lengths == (align,)
    assert len(batch.predictors) == len(batch.labels) == 0 and batch.pairs.num_pairs == 0
    assert batch.predictors.dtype == batch.labels.dtype == torch.int64


def test_sft_sees_chosen_responses_alone(data: PreparedPairs) -> None:
    batch = make_batch(data, [0, 1], sides=(CHOSEN,))
    assert batch.labels.tolist() == [4, 5, 13, 14, 15]
    assert batch.plan.query_lengths == (4, 4) and batch.pairs.side.tolist() == [CHOSEN] * 5
    assert batch.pairs.num_pairs == 2


def test_a_response_may_be_predicted_from_a_prompt_of_one_token(data: PreparedPairs) -> None:
    batch = make_batch(data, [2])
    assert batch.predictors.tolist() == [0, 1, 2, 3] and batch.labels.tolist() == [22, 23, 24, 25]


# ---------------------------------------------------------------- shared prompts


def test_a_shared_prompt_by_hand(data: PreparedPairs) -> None:
    """Tokens 11 and 12 stand once. Row 1 (token 12) predicts 13 and 16, the first token of either response."""
    batch = make_batch(data, [1], shared_prompts=True)
    assert batch.tokens.tolist() == [11, 12, 13, 14, 16]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2], "the rejected response continues the prompt"
    assert batch.predictors.tolist() == [1, 2, 3, 1, 4] and batch.labels.tolist() == [13, 14, 15, 16, 17]
    assert batch.plan.query_lengths == (4, 1) and batch.plan.key_lengths == (4, 3)
    assert batch.plan.key_rows is not None and batch.plan.key_rows.tolist() == [0, 1, 2, 3, 0, 1, 4]


def test_a_rejected_response_of_one_token_adds_a_label_and_no_token(data: PreparedPairs) -> None:
    batch = make_batch(data, [0], shared_prompts=True)
    assert batch.tokens.tolist() == [1, 2, 3, 4] and batch.plan.query_lengths == (4,)
    assert batch.predictors.tolist() == [2, 3, 2] and batch.labels.tolist() == [4, 5, 6]


def test_sharing_changes_no_label_and_no_pair(data: PreparedPairs) -> None:
    apart, shared = (make_batch(data, [2, 0, 1], shared_prompts=on) for on in (False, True))
    assert shared.labels.tolist() == apart.labels.tolist() and shared.samples == apart.samples
    assert shared.pairs.pair.tolist() == apart.pairs.pair.tolist()
    assert shared.pairs.side.tolist() == apart.pairs.side.tolist()
    assert len(apart.tokens) - len(shared.tokens) == sum(data.prompt_lengths)


def test_a_label_is_predicted_from_the_same_token_at_the_same_position_with_and_without_sharing(
    data: PreparedPairs,
) -> None:
    apart, shared = (make_batch(data, [2, 0, 1], shared_prompts=on) for on in (False, True))
    for rows in ("tokens", "positions"):
        of_apart, of_shared = (getattr(batch, rows)[batch.predictors].tolist() for batch in (apart, shared))
        assert of_apart == of_shared


def test_a_pair_whose_prompts_differ_is_laid_apart(data: PreparedPairs) -> None:
    """As in a folder of pairs that another program prepared: pair 1's rejected response has prompt 11, 99."""
    tokens = data.tokens.copy()
    tokens[data.starts[3] + 1] = 99
    other = replace(data, tokens=tokens)
    batch = make_batch(other, [0, 1, 2], shared_prompts=True)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 11, 12, 13, 14, 11, 99, 16, 21, 23, 24]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert tokens_read(other, np.arange(3), (CHOSEN, REJECTED), shared_prompts=True).tolist() == [4, 7, 3]


def test_tokens_are_counted_as_batches_hold_them(data: PreparedPairs) -> None:
    for shared in (False, True):
        counted = tokens_read(data, np.arange(3), (CHOSEN, REJECTED), shared_prompts=shared)
        held = [len(make_batch(data, [pair], shared_prompts=shared).tokens) for pair in range(3)]
        assert counted.tolist() == held == ([4, 5, 3] if shared else [7, 7, 4])


def test_one_response_alone_shares_nothing(data: PreparedPairs) -> None:
    one = make_batch(data, [0, 1], sides=(REJECTED,), shared_prompts=True)
    assert one.tokens.tolist() == make_batch(data, [0, 1], sides=(REJECTED,)).tokens.tolist()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("samples", [[], [2], [0, 1, 2]], ids=["no pair", "one pair", "three pairs"])
@pytest.mark.parametrize(("size", "align"), [(None, 1), (None, 4), (36, 1)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_shares_of_context_parallel_ranks_are_the_whole_batch(
    ranks: int, size: int | None, align: int, samples: list[int], shared: bool, data: PreparedPairs
) -> None:
    """Together they hold its tokens and positions and predict its labels, and `order` brings the labels back."""
    whole = make_batch(data, samples, size=size, align=align, shared_prompts=shared)
    options: dict[str, Any] = {"size": size, "align": align, "shared_prompts": shared}
    parts = [make_batch(data, samples, context_rank=rank, context_ranks=ranks, **options) for rank in range(ranks)]

    def real(batches: list[Batch]) -> list[tuple[int, int]]:
        rows = [row for batch in batches for row in zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True)]
        return sorted(row for row in rows if row[0])  # padding is token 0

    assert real(parts) == real([whole])
    held = [len(part.tokens) for part in parts]
    assert len(set(held)) == 1 and sum(held) % align == 0 and sum(held) == (size or sum(held))
    assert {part.padding for part in parts} == {sum(held) - (len(whole.tokens) - whole.padding)}
    most = parts[0].context_labels.most if parts[0].context_labels else 0
    assert most >= 1, "a collective of nothing is not sent"
    places = [(part.tokens[part.predictors], part.positions[part.predictors], part.labels) for part in parts]
    for of_ranks, of_whole in zip(
        zip(*places, strict=True),
        (whole.tokens[whole.predictors], whole.positions[whole.predictors], whole.labels),
        strict=True,
    ):
        padded = torch.cat([torch.nn.functional.pad(one, (0, most - len(one)), value=-1) for one in of_ranks])
        for part in parts:
            assert part.context_labels is not None and part.context_labels.most == most
            assert padded[part.context_labels.order].tolist() == of_whole.tolist()
    for rank, part in enumerate(parts):
        assert part.counts_pairs == (rank == 0)
        assert part.pairs.pair.tolist() == whole.pairs.pair.tolist() and part.samples == whole.samples


def test_a_run_gives_every_context_parallel_rank_its_share_of_the_same_pairs(data: PreparedPairs) -> None:
    config = Config(parallel=ParallelConfig(context_parallel_size=2), train=TrainConfig(micro_batch_size=1))
    cut = partial(rank_batches, data, np.arange(3), config, sides=(CHOSEN, REJECTED), rank=0, ranks=1)
    shares = [cut(device=torch.device("cpu"), context_rank=rank) for rank in (0, 1)]
    assert [batch.samples for batch in shares[0]] == [batch.samples for batch in shares[1]]
    rows = {batch.samples[0]: len(batch.tokens) for share in shares for batch in share}
    assert rows == {0: 2, 1: 3, 2: 2}, "halves of 4, 5 and 3 tokens"
