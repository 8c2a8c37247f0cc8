"""A few of the disturbed runs of `make faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import FEW_DAMAGES, disturbed_runs

pytestmark = pytest.mark.long


def test_killed_and_damaged_runs_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    rows = disturbed_runs(tmp_path, "", "--kills=4", "--few")
    assert not [(row.name, row.note) for row in rows if not row.passed]
    assert len(rows) >= 2 + FEW_DAMAGES
