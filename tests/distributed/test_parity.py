"""Rows of the parity matrix, one test each: every feature of a layout, and every loss. `make parity` has all rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.matrix import run_matrix
from tests.parity.rows import IN_TESTS, LIMITS, Result, Row, selected

ROWS = selected(IN_TESTS)
CASES = [(row, scores) for row in ROWS for scores in row.sources]
BOTH = [row for row in ROWS if {"live", "cached"} <= set(row.sources)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    folder: Path = tmp_path_factory.mktemp("parity")
    return {(result.row, result.scores): result for result in run_matrix(folder, IN_TESTS)}


@pytest.mark.parametrize(("row", "scores"), CASES, ids=[f"{row.name}, {scores}" for row, scores in CASES])
def test_layout_gives_what_one_process_gives(results: dict[tuple[str, str], Result], row: Row, scores: str) -> None:
    errors = results[row.name, scores].errors
    over = {kind: error for kind, error in errors.items() if not error <= LIMITS[kind]}
    assert not over, over


@pytest.mark.parametrize("row", BOTH, ids=lambda row: row.name)
def test_cached_loss_is_the_live_loss(results: dict[tuple[str, str], Result], row: Row) -> None:
    live, cached = (results[row.name, scores].losses for scores in ("live", "cached"))
    assert cached == pytest.approx(live, rel=1e-6, abs=1e-6)


def test_the_rows_of_the_tests_have_every_method_and_every_feature_of_the_matrix() -> None:
    everything = selected("")
    assert {row.method for row in ROWS} == {row.method for row in everything}
    layout = ("tp", "pp", "vp", "cp", "dp", "sequence_parallel", "distributed_optimizer")
    for feature in (*layout, "tied", "recompute", "fixed", "shared", "family"):
        assert {getattr(row, feature) for row in ROWS} == {getattr(row, feature) for row in everything}, feature
    for feature in ("tokens", "overlap"):
        assert {bool(getattr(row, feature)) for row in ROWS} == {False, True}, feature
