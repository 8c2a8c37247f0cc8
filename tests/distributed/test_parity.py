"""The layout matrix of tests.parity, one test a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import LIMITS, ROWS, Result, run_matrix


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    folder: Path = tmp_path_factory.mktemp("parity")
    return {(result.row, result.scores): result for result in run_matrix(folder)}


@pytest.mark.parametrize("scores", ["live", "cached"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_layout_gives_what_one_process_gives(results: dict[tuple[str, str], Result], row: object, scores: str) -> None:
    errors = results[row.name, scores].errors  # type: ignore[attr-defined]
    over = {kind: error for kind, error in errors.items() if not error <= LIMITS[kind]}
    assert not over, over


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_cached_loss_is_the_live_loss(results: dict[tuple[str, str], Result], row: object) -> None:
    # Both are within their error of the same oracle, so this bounds their difference.
    difference = sum(results[row.name, scores].errors["loss"] for scores in ("live", "cached"))  # type: ignore[attr-defined]
    assert difference <= 1e-6
