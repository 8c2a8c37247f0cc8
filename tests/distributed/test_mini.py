"""The miniature runs from nothing to its tables, through the public commands, and its numbers hang together."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.mini.report import METHODS, NAME, tables
from bench.mini.rules import CLAIMS, QUESTIONS
from bench.pages import with_tables

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the fast variant wrote, and everything it made on the way."""
    folder = tmp_path_factory.mktemp("mini")
    (folder / "page.md").write_text(f"before\n<!-- {NAME}: begin -->\n<!-- {NAME}: end -->\nafter\n", encoding="utf-8")
    places = ["--json", folder / "mini.json", "--picture", folder / "mini.svg", "--page", folder / "page.md"]
    command = [sys.executable, "-m", "bench.mini", "--fast", *map(str, places), "--keep", str(folder / "work")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    text = (folder / "mini.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_every_claim_has_a_number_of_every_seed_and_a_verdict(summary: dict[str, Any]) -> None:
    seeds = summary["effort"]["seeds"]
    assert list(summary["claims"]) == [claim.name for claim in (*CLAIMS, *QUESTIONS)]
    for found in summary["claims"].values():
        assert len(found["values"]) == len(seeds) > 1 and all(map(math.isfinite, found["values"]))
        assert found["verdict"] in ("reproduced", "contradicted", "undecided")


def test_all_runs_of_a_seed_start_alike_and_move_away_from_the_start(summary: dict[str, Any]) -> None:
    assert set(summary["curves"]) == set(METHODS)
    firsts = {json.dumps([curve[0] for curve in curves]) for curves in summary["accuracy"].values()}
    assert len(firsts) == 1  # before the first step
    for curves in summary["curves"].values():
        for curve in curves:
            assert all(0 <= point["win"] <= 100 and point["kl"] != 0 for point in curve)


def test_what_ran_are_the_public_commands(folder: Path) -> None:
    logs = [path.read_text(encoding="utf-8").splitlines()[0] for path in folder.glob("work/*/logs/*/*.log")]
    programs = {line.split()[3] for line in logs}
    assert {line.split()[:3] == ["$", "python", "-m"] for line in logs} == {True}
    assert programs >= {"recipes.train", "recipes.score", "tools.sample", "tools.annotate", "tools.compare"}


def test_the_page_gets_the_tables_of_the_results(folder: Path, summary: dict[str, Any]) -> None:
    page = (folder / "page.md").read_text(encoding="utf-8")
    assert page.startswith("before\n") and page.endswith("\nafter\n") and page.count("|---|") > 6
    assert with_tables(folder / "page.md", tables(summary)) == page
    assert (folder / "mini.svg").read_text(encoding="utf-8").startswith("<svg")
