"""The flat batch: labels shifted once, positions restarted, segments apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tgdpo_megatron.config import Config, ParallelConfig, TrainConfig
from tgdpo_megatron.data.batch import make_batch, rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs
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
