"""No micro-batch makes a GPU and its host wait for each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.program import run_ranks
from tgdpo_megatron.losses import LOSSES

LOSSES: dict[str, dict[str, str]] = {name: {} for name in LOSSES} | {"simpo_reg": {"token_rewards": "file"}}


@pytest.fixture(scope="module")
def waits(checkpoint: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = run_ranks("tests.support.syncs", "record", 1, folder=str(checkpoint), losses=LOSSES)
    return found


@pytest.mark.parametrize("method", LOSSES)
def test_no_line_of_a_micro_batch_waits_for_the_other_side(method: str, waits: dict[str, list[str]]) -> None:
    assert waits[method] == []


def test_a_line_that_waits_would_be_recorded() -> None:
    found: list[str] = run_ranks("tests.support.syncs", "planted", 1)
    assert [line.rpartition(": ")[0].rpartition(":")[0].startswith("syncs.py") for line in found] == [True] * len(found)
    assert len(found) == 4
