"""Sequences packed together do not see each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.program import run_ranks

FIRST, SECOND, OTHER = [1, 40, 7, 250, 12], [3, 9, 120, 44, 8, 66, 5], [3, 200, 14, 90, 8, 1, 31]


@pytest.fixture(scope="module")
def logps(checkpoint: Path) -> list[list[list[float]]]:
    packs = [[FIRST, SECOND], [FIRST, OTHER], [FIRST], [SECOND]]
    found: list[list[list[float]]] = run_ranks(
        "tests.distributed.jobs", "packed_logps", 1, folder=str(checkpoint), packs=packs
    )
    return found


def test_perturbing_a_neighbour_changes_nothing(logps: list[list[list[float]]]) -> None:
    assert logps[0][0] == logps[1][0]
    assert logps[0][1] != logps[1][1]


def test_a_packed_sequence_has_the_log_probs_it_has_alone(logps: list[list[list[float]]]) -> None:
    # Matrix products of another height round differently.
    assert logps[0][0] == pytest.approx(logps[2][0], abs=2e-6)
    assert logps[0][1] == pytest.approx(logps[3][0], abs=2e-6)
