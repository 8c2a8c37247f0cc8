"""The token-credit benchmark runs from nothing to its report, and its controls are what they must be."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.credit.methods import METHODS, SOURCES

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the fast variant wrote."""
    folder = tmp_path_factory.mktemp("credit")
    places = [f"--{name}={folder / f'credit.{name}'}" for name in ("json", "report", "picture")]
    command = [sys.executable, "-W", "ignore", "-m", "bench.credit", "--fast", *places]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def summary(outputs: Path) -> dict[str, Any]:
    text = (outputs / "credit.json").read_text()
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_every_method_has_every_number_of_every_seed(summary: dict[str, Any]) -> None:
    seeds = summary["effort"]["seeds"]
    assert list(summary["methods"]) == [method.name for method in METHODS]
    for numbers in summary["methods"].values():
        for name, number in numbers.items():
            if isinstance(number, dict) and "values" in number and name != "steps":
                assert len(number["values"]) == len(seeds) > 1
                assert math.isfinite(number["mean"]) and math.isfinite(number["spread"])
        assert len(numbers["curves"]["loss"]) == len(numbers["curves"]["exact"]) == len(seeds)
        assert all(len(losses) == summary["effort"]["steps"] for losses in numbers["curves"]["loss"])


def test_known_mistakes_are_found_and_random_numbers_find_nothing(summary: dict[str, Any]) -> None:
    assert list(summary["sources"]) == list(SOURCES)
    for part in ("train", "validation"):
        assert summary["sources"]["file"][part]["auroc"]["values"] == [1.0, 1.0]
        assert summary["sources"]["random"][part]["auroc"]["mean"] == pytest.approx(0.5, abs=0.06)
        chance = summary["wrong_share"]["mean"]
        assert summary["sources"]["random"][part]["average_precision"]["mean"] == pytest.approx(chance, abs=0.06)


def test_all_methods_start_from_the_same_model(summary: dict[str, Any]) -> None:
    starts = {json.dumps([seed[0] for seed in of["curves"]["accuracy"]]) for of in summary["methods"].values()}
    assert len(starts) == 1
    ln2 = [losses[0] for name in ("DPO", "TGDPO, α = 2", "TDPO2") for losses in losses_of(summary, name)]
    assert ln2 == pytest.approx([math.log(2)] * len(ln2), abs=1e-5)


def losses_of(summary: dict[str, Any], method: str) -> Iterator[list[float]]:
    yield from summary["methods"][method]["curves"]["loss"]


def test_the_report_needs_nothing_from_elsewhere(outputs: Path) -> None:
    page = (outputs / "credit.report").read_text()
    assert all(method.name in page for method in METHODS)
    assert page.count("<svg") == 5
    assert "<script" not in page and 'src="' not in page
    assert (outputs / "credit.picture").read_text().startswith("<svg")
