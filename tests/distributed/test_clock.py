"""Where the time of a step goes, where it is known: delays are planted, and the clock must find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.program import run_ranks

STEPS, IN_READING, IN_REFERENCE = 3, 0.4, 0.1


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> dict[str, Any]:
    """Two data-parallel ranks, of which the last is late to every step."""
    delays = {"steps": STEPS, "in_reading": IN_READING, "in_reference": IN_REFERENCE}
    spent: dict[str, Any] = run_ranks("tests.support.planted_delays", "spent", 2, folder=str(checkpoint), **delays)
    return spent


def test_the_others_wait_for_a_rank_that_is_late(found: dict[str, Any]) -> None:
    late = STEPS * IN_READING
    first, last = found["waiting"]
    assert 0.8 * late < first - last < 1.5 * late
    assert found["seconds"]["waiting"] == pytest.approx((first + last) / 2)
    assert late / 2 < found["seconds"]["reading"] < late


def test_the_time_of_a_frozen_model_is_not_the_policys(found: dict[str, Any]) -> None:
    frozen = STEPS * IN_REFERENCE
    assert frozen < found["seconds"]["frozen"] < frozen + found["seconds"]["policy"]


def test_every_moment_counts_once(found: dict[str, Any]) -> None:
    assert sum(found["seconds"].values()) == pytest.approx(found["whole"], rel=0.02, abs=0.02)


def test_measuring_adds_no_barrier(found: dict[str, Any]) -> None:
    assert found["barriers"] == 0


def test_what_ranks_vote_is_asked_after_the_pass(found: dict[str, Any]) -> None:
    """So that a signal during the pass still ends the run with this step."""
    assert found["passes"] == 2 * STEPS
