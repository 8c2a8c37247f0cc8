"""The flat batch: sequences one after another, with explicit boundaries and labelled tokens.

Legend: T tokens of a micro-batch (with alignment padding), R labelled response tokens, P pairs,
n segments. A segment is one sequence. Attention never crosses the boundary of a segment, and positions restart in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgdpo_megatron.config import Config
from tgdpo_megatron.data.order import micro_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.losses.pairs import CHOSEN, REJECTED, Pairs

PADDING_SEGMENT = 256
"""Tokens of one segment of padding. The time of attention grows with the square of a segment's length."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank.

    Attributes:
        tokens: Input ids. [T] int64.
        positions: Position of each token in its segment. [T] int64.
        segment_lengths: Lengths of the n segments, which sum to T. Kept on the host, so that attention need not wait.
        cu_seqlens: Segment boundaries. [n+1] int32.
        predictors: Index of the token whose hidden state predicts each label. Labels are shifted here and nowhere else.
            [R] int64.
        labels: Ids of the predicted tokens. [R] int64.
        pairs: Pair and side of each labelled token.
        scores: Cached scores of the labelled tokens by name (see scores/store.py). Each [R] fp32.
        samples: Index of each pair in the data set, in the order of the batch.
        padding: Number of tokens at the end of the T tokens that only fill the batch.
    """

    tokens: Tensor
    positions: Tensor
    segment_lengths: tuple[int, ...]
    cu_seqlens: Tensor
    predictors: Tensor
    labels: Tensor
    pairs: Pairs
    scores: dict[str, Tensor]
    samples: tuple[int, ...]
    padding: int = 0

    @property
    def longest_segment(self) -> int:
        """Tokens of the longest segment."""
        return max(self.segment_lengths)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device. The host does not wait, because the copies start from pinned memory."""
        if device.type == "cpu":
            return self

        def move(value: Tensor) -> Tensor:
            return value.pin_memory().to(device, non_blocking=True)

        moved: dict[str, Any] = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        pairs = replace(self.pairs, pair=move(self.pairs.pair), side=move(self.pairs.side))
        scores = {name: move(value) for name, value in self.scores.items()}
        return replace(self, **moved, pairs=pairs, scores=scores)


def rank_batches(
    data: PreparedPairs,
    picked: np.ndarray,
    config: Config,
    *,
    sides: tuple[int, ...],
    rank: int,
    ranks: int,
    device: torch.device,
    scores: TokenScores | None = None,
) -> list[Batch]:
    """One data-parallel rank's micro-batches of some pairs. Every rank gets the same number of micro-batches.

    Args:
        picked: Indices of the pairs. [n] int64.
        sides: Which responses to include.
        rank: Index of this rank in the data-parallel group.
        ranks: Size of the data-parallel group.
        scores: Cached token scores to put into the batches.
    """
    parallel, settings = config.parallel, config.train
    cut = micro_batches(
        data.lengths(sides)[picked],
        settings,
        ranks=ranks,
        multiple_of=parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size else 1,
    )
    return [
        make_batch(
            data,
            [int(pair) for pair in picked[places]],
            sides=sides,
            scores=scores,
            align=config.token_multiple,
            size=settings.micro_batch_tokens if settings.fixed_micro_batches else None,
        ).to(device)
        for places in cut[rank]
    ]


def make_batch(
    data: PreparedPairs,
    samples: Sequence[int],
    *,
    sides: tuple[int, ...] = (CHOSEN, REJECTED),
    scores: TokenScores | None = None,
    align: int = 1,
    size: int | None = None,
) -> Batch:
    """Lay the sequences of some pairs one after another.

    The last token of a sequence predicts nothing, so the batch leaves it out.

    Args:
        data: Tokenised pairs.
        samples: Indices of the pairs. Without any, the batch holds padding only.
        sides: Which responses to include; SFT needs only CHOSEN.
        scores: Cached token scores of `data`, to put into the batch.
        align: T is padded to a multiple of this number. Padding forms segments of its own.
        size: The batch is padded to this T instead, and `align` is not read.

    Raises:
        ValueError: The sequences are longer than `size`.
    """
    tokens, lengths, predictors, labels, pair, side = [], [], [], [], [], []
    offset = 0
    for order, sample in enumerate(samples):
        prompt = int(data.prompt_lengths[sample])
        for which in sides:
            sequence = data.sequence(sample, which)
            response = len(sequence) - prompt
            tokens.append(sequence[:-1])
            labels.append(sequence[prompt:])
            predictors.append(np.arange(offset + prompt - 1, offset + len(sequence) - 1))
            pair.append(np.full(response, order))
            side.append(np.full(response, which))
            lengths.append(len(sequence) - 1)
            offset += len(sequence) - 1
    end = size if size is not None else max(align, -(-offset // align) * align)  # never empty
    if end < offset:
        raise ValueError(f"{offset} tokens do not fit a batch of {end}")
    tokens.append(np.zeros(end - offset, dtype=np.int32))
    lengths += [min(PADDING_SEGMENT, end - place) for place in range(offset, end, PADDING_SEGMENT)]
    return Batch(
        tokens=_tensor(tokens),
        positions=_tensor([np.arange(length) for length in lengths]),
        segment_lengths=tuple(lengths),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        predictors=_tensor(predictors),
        labels=_tensor(labels),
        pairs=Pairs(_tensor(pair), _tensor(side), num_pairs=len(samples)),
        scores=scores.join(samples, sides) if scores is not None else {},
        samples=tuple(int(sample) for sample in samples),
        padding=end - offset,
    )


def _tensor(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64))
