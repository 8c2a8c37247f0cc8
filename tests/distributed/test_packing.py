"""Sequences packed together do not see each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.program import run_ranks

FIRST, OTHER, SECOND = [1, 40, 7, 250, 12], [3, 200, 14, 90, 8], [3, 9, 120, 44, 8, 66, 5]


@pytest.fixture(scope="module")
def logps(checkpoint: Path) -> list[list[list[float]]]:
    packs = [[FIRST, SECOND], [OTHER, SECOND], [FIRST], [SECOND]]
    found: list[list[list[float]]] = run_ranks(
        "tests.support.jobs", "packed_logps", 1, folder=str(checkpoint), packs=packs
    )
    return found


def test_perturbing_the_sequence_before_changes_nothing(logps: list[list[list[float]]]) -> None:
    """Causal attention alone would hide a change of the one after."""
    assert logps[0][1] == logps[1][1]
    assert logps[0][0] != logps[1][0]


def test_a_packed_sequence_has_the_log_probs_it_has_alone(logps: list[list[list[float]]]) -> None:
    # Matrix products of another height round differently.
    assert logps[0][0] == pytest.approx(logps[2][0], abs=2e-6)
    assert logps[0][1] == pytest.approx(logps[3][0], abs=2e-6)
