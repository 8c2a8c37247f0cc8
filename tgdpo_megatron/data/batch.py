"""The flat batch: sequences one after another, with a plan of what attends to what, and labelled tokens.

Both responses of a pair continue the same prompt. Where the prompt is shared, the batch holds it once: the prompt with
the chosen response, then the rejected response, which sees the prompt and has the positions that follow it. The last
token of the prompt then predicts the first token of both responses.

Under context parallelism each rank holds some of the tokens, and the labels that these predict. Pairs and scores are
those of the whole micro-batch on every rank.

Legend: T tokens of a micro-batch (with padding), t tokens of this rank (all T without context parallelism), R labelled
response tokens, r of them predicted on this rank, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgdpo_megatron.config import Config
from tgdpo_megatron.config.constants import round_up
from tgdpo_megatron.data.attention_plan import AttentionPlan, Segment, rows_of_rank
from tgdpo_megatron.data.order import micro_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.shared_prompts import tokens_read, tokens_read_by_side
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.losses.pairs import CHOSEN, REJECTED, Pairs


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank, or a context-parallel rank's share of it.

    Attributes:
        tokens: Input ids of this rank. [t] int64.
        positions: Position of each token in its sequence. [t] int64.
        plan: What each token attends to.
        predictors: Index of the token whose hidden state predicts each label. Labels are shifted here and nowhere else.
            Two labels may have the same predictor. [r] int64.
        labels: Ids of the predicted tokens. [r] int64.
        pairs: Pair and side of each of the R labelled tokens.
        scores: Cached scores of the R labelled tokens by name (see scores/store.py). Each [R] fp32.
        samples: Index of each pair in the data set, in the order of the batch.
        padding: Number of the T tokens that only fill the batch.
        context_labels: Where the labels of all context-parallel ranks are; None without context parallelism.
    """

    tokens: Tensor
    positions: Tensor
    plan: AttentionPlan
    predictors: Tensor
    labels: Tensor
    pairs: Pairs
    scores: dict[str, Tensor]
    samples: tuple[int, ...]
    padding: int = 0
    context_labels: ContextLabels | None = None

    @property
    def counts_pairs(self) -> bool:
        """Whether this rank counts the pairs: one of the context-parallel ranks, which all compute the same losses."""
        return self.context_labels is None or self.context_labels.rank == 0

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device. The host does not wait, because the copies start from pinned memory."""
        if device.type == "cpu":
            return self

        def move(value: Tensor) -> Tensor:
            return value.pin_memory().to(device, non_blocking=True)

        moved: dict[str, Any] = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.context_labels is not None:
            moved["context_labels"] = replace(self.context_labels, order=move(self.context_labels.order))
        pairs = replace(self.pairs, pair=move(self.pairs.pair), side=move(self.pairs.side))
        scores = {name: move(value) for name, value in self.scores.items()}
        return replace(self, **moved, plan=self.plan.to(device), pairs=pairs, scores=scores)


@dataclass(frozen=True)
class ContextLabels:
    """Where the R labelled tokens are among those of the context-parallel ranks.

    Attributes:
        rank: This rank.
        most: Labels of the rank that has the most. The others' are padded to as many, so that they can be gathered.
        order: Place of each label among the ranks' padded labels, rank after rank. [R] int64.
    """

    rank: int
    most: int
    order: Tensor


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
    context_rank: int = 0,
) -> list[Batch]:
    """One rank's micro-batches of some pairs. Every data-parallel rank gets the same number of micro-batches.

    Args:
        picked: Indices of the pairs. [n] int64.
        sides: Which responses to include.
        rank: Index of this rank in the data-parallel group.
        ranks: Size of the data-parallel group.
        scores: Cached token scores to put into the batches.
        context_rank: Index of this rank in the context-parallel group.
    """
    parallel, settings = config.parallel, config.train
    cut = micro_batches(
        tokens_read(data, picked, sides, shared_prompts=settings.shared_prompts),
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
            shared_prompts=settings.shared_prompts,
            context_rank=context_rank,
            context_ranks=parallel.context_parallel_size,
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
    shared_prompts: bool = False,
    context_rank: int = 0,
    context_ranks: int = 1,
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
        shared_prompts: Whether the second response of a pair is given no prompt of its own, and sees the first's.
        context_rank: Index of this rank in the context-parallel group.
        context_ranks: Size of the context-parallel group, of which T is made a multiple.

    Raises:
        ValueError: The sequences are longer than `size`.
    """
    whole = _laid_out(data, samples, sides, shared_prompts=shared_prompts)
    multiple = math.lcm(context_ranks, align)
    end = size if size is not None else max(multiple, round_up(len(whole.tokens), multiple))  # never empty
    if end < len(whole.tokens):
        raise ValueError(f"{len(whole.tokens)} tokens do not fit a batch of {end}")
    rows = end // context_ranks
    held = rows_of_rank(whole.segments, rows=rows, rank=context_rank, ranks=context_ranks)
    own, predictors, context_labels = _labels_of_rank(held.places[whole.predictors], rows, context_rank, context_ranks)
    return Batch(
        tokens=_tensor([whole.tokens[held.rows], np.zeros(rows - len(held.rows), dtype=np.int64)]),
        positions=_tensor([whole.positions[held.rows], *(np.arange(n) for n in held.padding)]),
        plan=held.plan,
        predictors=_tensor([predictors]),
        labels=_tensor([whole.labels[own]]),
        pairs=Pairs(_tensor([whole.pair]), _tensor([whole.side]), num_pairs=len(samples)),
        scores=scores.join(samples, sides) if scores is not None else {},
        samples=tuple(int(sample) for sample in samples),
        padding=end - len(whole.tokens),
        context_labels=context_labels,
    )


@dataclass(frozen=True)
class _Sequences:
    """The sequences of some pairs one after another: N tokens, before padding and before context-parallel ranks split.

    Attributes:
        segments: The sequences.
        tokens: Input ids. [N] int64.
        positions: Position of each token in its sequence. [N] int64.
        predictors: Index of the token that predicts each label. [R] int64.
        labels: Ids of the predicted tokens. [R] int64.
        pair: Pair of each label. [R] int64.
        side: Side of each label. [R] int64.
    """

    segments: list[Segment]
    tokens: np.ndarray
    positions: np.ndarray
    predictors: np.ndarray
    labels: np.ndarray
    pair: np.ndarray
    side: np.ndarray


def _laid_out(
    data: PreparedPairs, samples: Sequence[int], sides: tuple[int, ...], *, shared_prompts: bool
) -> _Sequences:
    segments: list[Segment] = []
    tokens, positions, predictors, labels, pair, side = [], [], [], [], [], []
    offset = 0
    picked = np.asarray(samples, dtype=np.int64)
    _, shared = tokens_read_by_side(data, picked, sides, shared_prompts=shared_prompts)
    for place, sample in enumerate(samples):
        prompt, first = int(data.prompt_lengths[sample]), offset
        for which, given in zip(sides, shared[place].tolist(), strict=True):  # `given`: tokens that are there already
            sequence = data.sequence(sample, which)
            response = len(sequence) - prompt
            segments.append(Segment(offset, len(sequence) - 1 - given, first if given else 0, given))
            tokens.append(sequence[given:-1])
            positions.append(np.arange(given, len(sequence) - 1))
            labels.append(sequence[prompt:])
            ends = np.arange(offset + prompt - given - 1, offset + len(sequence) - given - 1)
            if given:
                ends[0] = first + prompt - 1
            predictors.append(ends)
            pair.append(np.full(response, place))
            side.append(np.full(response, which))
            offset += len(sequence) - 1 - given
    return _Sequences(segments, *map(_joined, (tokens, positions, predictors, labels, pair, side)))


def _labels_of_rank(
    places: np.ndarray, rows: int, rank: int, ranks: int
) -> tuple[np.ndarray, np.ndarray, ContextLabels | None]:
    """Which labels a context-parallel rank predicts, from which of its tokens, and where those of all ranks are.

    Args:
        places: Place of each label's predictor among the tokens of all ranks. [R] int64.
        rows: Tokens of each rank.
    """
    if ranks == 1:
        return np.arange(len(places)), places, None
    holder, local = np.divmod(places, rows)
    counts = np.bincount(holder, minlength=ranks)
    most, order = max(1, int(counts.max())), np.empty(len(places), dtype=np.int64)
    for one in range(ranks):
        order[holder == one] = one * most + np.arange(counts[one])
    own = np.flatnonzero(holder == rank)
    return own, local[own], ContextLabels(rank, most, torch.from_numpy(order))


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)


def _tensor(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(_joined(parts))
