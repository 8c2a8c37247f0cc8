"""Consecutive elements of a tensor as boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tgdpo_megatron.checkpoint.shards import boxes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (2, 2, 3, 2)])
def test_boxes_hold_the_elements_in_their_order(shape: tuple[int, ...]) -> None:
    """Whatever the first and the last element are; numpy's own indexing tells which they are."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for first in range(numbers.size + 1):
        for last in range(first, numbers.size + 1):
            found = [
                numbers[tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))].ravel()
                for offset, sizes in boxes(shape, first, last)
            ]
            assert np.concatenate([[], *found]).tolist() == list(range(first, last))


def test_a_run_of_elements_of_a_matrix_is_three_boxes_at_most() -> None:
    assert max(len(list(boxes((9, 8), first, last))) for first in range(72) for last in range(first, 73)) == 3
