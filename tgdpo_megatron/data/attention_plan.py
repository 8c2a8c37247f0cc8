"""Which rows of a micro-batch see which: the attention plan, and its split over context-parallel ranks.

A micro-batch is a list of segments. The queries of a segment see the rows of its prefix, if it has one, and its own
rows up to themselves. A sequence without a prefix is plain causal attention. A rejected response that has its prompt as
prefix shares the prompt with the chosen response. The plan is a list of blocks: each is some rows of queries, and the
rows of keys that they see. The mask of a block is causal and aligned at the bottom right: the last query sees all keys,
the one before it all but the last key, and so on.

Context parallelism splits the rows. Each segment is cut into two chunks for each rank, and rank i gets the chunks i and
2 · ranks − 1 − i, so that every rank has early queries, which see few keys, and late ones, which see many. A chunk is a
block whose keys are all rows before it. Chunks need not have the same length, so no segment is padded.

Legend: T rows of a micro-batch, C context-parallel ranks, t = T / C rows of each rank, K keys of all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

PADDING_SEGMENT = 256
"""Rows of one segment of padding. The time of attention grows with the square of a segment's length."""


@dataclass(frozen=True)
class Segment:
    """Rows [start, start + length) of a micro-batch, which continue the rows [prefix_start, prefix_start + prefix)."""

    start: int
    length: int
    prefix_start: int = 0
    prefix: int = 0


@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of one rank. The queries of all blocks, one after another, are the t rows of the rank.

    Attributes:
        query_lengths: Queries of each of the n blocks. They sum to t. Kept on the host, so that attention need not
            wait.
        key_lengths: Keys of each block. They sum to K.
        key_rows: Rows of the keys of the blocks, one block after another, among the C · t rows that the ranks hold
            together, rank after rank. [K] int64. None where queries and keys are the same rows.
        cu_seqlens_q: Boundaries of the queries of the blocks. [n + 1] int32.
        cu_seqlens_kv: Boundaries of their keys. [n + 1] int32.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    key_rows: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int], key_rows: np.ndarray | None) -> AttentionPlan:
        """The plan with these blocks."""
        return cls(
            tuple(query_lengths),
            tuple(key_lengths),
            None if key_rows is None else torch.from_numpy(key_rows),
            *(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (query_lengths, key_lengths)),
        )

    @classmethod
    def plain(cls, lengths: Sequence[int]) -> AttentionPlan:
        """The plan of sequences that lie one after another and share nothing, on one rank."""
        return cls.of(lengths, lengths, None)

    @property
    def most_queries(self) -> int:
        """Queries of the longest block."""
        return max(self.query_lengths)

    @property
    def most_keys(self) -> int:
        """Keys of the block that has the most of them. No position of a row of the rank is as high as this number."""
        return max(self.key_lengths)

    def to(self, device: torch.device) -> AttentionPlan:
        """The same plan on another device. The host does not wait, because the copies start from pinned memory."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class RankRows:
    """What one context-parallel rank holds of a micro-batch.

    Attributes:
        rows: The rows of the micro-batch that the rank holds, in the order of its blocks, without padding. int64.
        plan: The blocks, with those of padding at the end.
        places: Where each row of the micro-batch is among the C · t rows of all ranks. int64.
        padding: Rows of each segment of padding.
    """

    rows: np.ndarray
    plan: AttentionPlan
    places: np.ndarray
    padding: tuple[int, ...]


def rows_of_rank(segments: Sequence[Segment], *, rows: int, rank: int = 0, ranks: int = 1) -> RankRows:
    """One context-parallel rank's share of a micro-batch.

    Args:
        segments: They lie one after another, from row 0.
        rows: t, the rows of each rank with its padding. At least the segments' rows divided by `ranks`, rounded up.
        rank: Which rank, of `ranks`.
    """
    cuts = _cuts([segment.length for segment in segments], ranks)
    held = [_rows_of(segments, cuts, one, ranks) for one in range(ranks)]
    places = np.empty(sum(map(len, held)), dtype=np.int64)
    for one, its_rows in enumerate(held):
        places[its_rows] = one * rows + np.arange(len(its_rows))
    queries, keys, key_rows = [], [], []
    for segment, cut in zip(segments, cuts, strict=True):
        prefix = places[segment.prefix_start : segment.prefix_start + segment.prefix]
        for first, last in _chunks(cut, rank, ranks):
            queries.append(last - first)
            keys.append(segment.prefix + last)
            key_rows += [prefix, places[segment.start : segment.start + last]]
    filled = len(held[rank])
    padding = [min(PADDING_SEGMENT, rows - place) for place in range(filled, rows, PADDING_SEGMENT)]
    key_rows.append(rank * rows + np.arange(filled, rows))
    queries, keys = queries + padding, keys + padding
    plain = ranks == 1 and queries == keys
    plan = AttentionPlan.of(queries, keys, None if plain else np.concatenate(key_rows))
    return RankRows(held[rank], plan, places, tuple(padding))


def _cuts(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Where each segment is cut: 2 · ranks + 1 places. The ranks' rows differ by one at most.

    All chunks of a segment get the same number of rows. Rows that are left over go to the ranks with the fewest.
    """
    load = [0] * ranks
    cuts = []
    for length in lengths:
        even, left = divmod(length, 2 * ranks)
        sizes = [even] * (2 * ranks)
        for _ in range(left):
            fewest = min(range(ranks), key=load.__getitem__)
            early = sizes[fewest] == even
            sizes[fewest if early else 2 * ranks - 1 - fewest] += 1
            load[fewest] += 1
        cuts.append([0, *accumulate(sizes)])
    return cuts


def _chunks(cut: Sequence[int], rank: int, ranks: int) -> list[tuple[int, int]]:
    """First row and end of a rank's chunks of a segment, without empty ones. Chunks that adjoin are one."""
    early, late = (tuple(cut[chunk : chunk + 2]) for chunk in (rank, 2 * ranks - 1 - rank))
    chunks = [(early[0], late[1])] if early[1] == late[0] else [early, late]
    return [(first, last) for first, last in chunks if first < last]


def _rows_of(segments: Sequence[Segment], cuts: Sequence[Sequence[int]], rank: int, ranks: int) -> np.ndarray:
    parts = [
        np.arange(segment.start + first, segment.start + last)
        for segment, cut in zip(segments, cuts, strict=True)
        for first, last in _chunks(cut, rank, ranks)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
