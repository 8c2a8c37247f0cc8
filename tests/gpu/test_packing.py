"""Sequences packed together do not see each other on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.gpu_where import on_gpu

FIRST, OTHER, SECOND = [1, 40, 7, 250, 12], [3, 200, 14, 90, 8], [3, 9, 120, 44, 8, 66, 5]
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
"""Products of another height: other kernels, which round differently. bf16 logits of size 4 have steps of 2^-6."""


@pytest.fixture(scope="module")
def logps(arithmetic: tuple[str, str], checkpoint: Path) -> list[list[list[float]]]:
    layers, precision = arithmetic
    packs = [[FIRST, SECOND], [OTHER, SECOND], [FIRST], [SECOND]]
    found: list[list[list[float]]] = on_gpu(
        "packed_logps", layers=layers, folder=str(checkpoint), packs=packs, precision=precision
    )
    return found


def test_perturbing_the_sequence_before_changes_nothing(logps: list[list[list[float]]]) -> None:
    """Causal attention alone would hide a change of the one after."""
    assert logps[0][1] == logps[1][1]
    assert logps[0][0] != logps[1][0]


def test_a_packed_sequence_has_the_log_probs_it_has_alone(
    logps: list[list[list[float]]], arithmetic: tuple[str, str]
) -> None:
    for place, alone in ((0, 2), (1, 3)):
        assert logps[0][place] == pytest.approx(logps[alone][0], abs=TOLERANCE[arithmetic[1]])
