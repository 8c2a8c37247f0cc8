"""The gradient is divided by the number of pairs of all ranks, as Megatron would, and without asking for the number."""

from __future__ import annotations

from pathlib import Path

from tests.support.program import run_ranks


def test_two_ranks_with_different_numbers_of_pairs_get_megatrons_gradient_bit_for_bit(checkpoint: Path) -> None:
    found = run_ranks("tests.support.divided", "compare", 2, folder=str(checkpoint))
    assert found["pairs"] == {"same bits": True, "zero": False, "finite": True}
    assert found["none"] == {"same bits": True, "zero": True, "finite": True}, "a division by 0 would give no number"
