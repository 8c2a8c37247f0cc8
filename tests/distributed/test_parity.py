"""The matrix of tests.parity, one test a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.matrix import run_matrix
from tests.parity.rows import LIMITS, ROWS, Result, Row

CASES = [(row, scores) for row in ROWS for scores in row.sources]
BOTH = [row for row in ROWS if {"live", "cached"} <= set(row.sources)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    folder: Path = tmp_path_factory.mktemp("parity")
    return {(result.row, result.scores): result for result in run_matrix(folder)}


@pytest.mark.parametrize(("row", "scores"), CASES, ids=[f"{row.name}, {scores}" for row, scores in CASES])
def test_layout_gives_what_one_process_gives(results: dict[tuple[str, str], Result], row: Row, scores: str) -> None:
    errors = results[row.name, scores].errors
    over = {kind: error for kind, error in errors.items() if not error <= LIMITS[kind]}
    assert not over, over


@pytest.mark.parametrize("row", BOTH, ids=lambda row: row.name)
def test_cached_loss_is_the_live_loss(results: dict[tuple[str, str], Result], row: Row) -> None:
    live, cached = (results[row.name, scores].losses for scores in ("live", "cached"))
    assert cached == pytest.approx(live, rel=1e-6, abs=1e-6)
