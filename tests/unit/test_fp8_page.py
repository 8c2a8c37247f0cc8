"""docs/fp8.md says what results/fp8.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.fp8.cases import TRAINED
from bench.fp8.report import NAME, rows, tables
from bench.pages import with_tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/fp8.md"


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return json.loads((ROOT / "results/fp8.json").read_text(encoding="utf-8"))


def test_the_tables_of_the_page_are_those_of_the_results(summary: dict[str, Any]) -> None:
    assert with_tables(PAGE, tables(summary)) == PAGE.read_text(encoding="utf-8")


def test_the_results_are_of_a_whole_run_of_a_commit(summary: dict[str, Any]) -> None:
    assert "dirty" not in summary["machine"]["commit"]
    assert all(len(run["loss"]) == summary["effort"]["steps"] >= 100 for run in summary["curves"].values())
    assert set(TRAINED) <= set(summary["curves"]) & set(summary["trained"]["recipes"])


def test_the_verdicts_in_the_results_are_those_of_their_numbers(summary: dict[str, Any]) -> None:
    assert [row.as_dict() for row in rows(summary)] == summary["rows"]


def test_every_table_says_what_computed_fp8(summary: dict[str, Any]) -> None:
    titles = [line for line in tables(summary)[NAME].splitlines() if line.startswith("**")]
    assert titles and all(title.endswith(f"({summary['where']})") for title in titles)
