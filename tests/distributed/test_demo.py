"""The demo runs from nothing to its report."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.browser import assert_nothing_is_clipped, needs_chromium

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-m", *command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    run("tools.demo", "--fast", "--output", str(folder))
    return folder


def test_fast_demo_writes_a_report_of_three_models(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert "TGDPO (after)" in page and "<svg" in page
    numbers = json.loads((demo / "demo.json").read_text())["comparison"]
    assert len(numbers) == 3
    assert all(math.isfinite(value) for model in numbers.values() for (value,) in model.values())


def test_no_two_losses_share_a_chart(demo: Path) -> None:
    """Losses of different methods are different things."""
    figures = re.findall(r"<figure.*?</figure>", (demo / "report.html").read_text("utf-8"), re.DOTALL)
    losses = {found[1]: figure for figure in figures if (found := re.search("<h3>Loss of (.*?)</h3>", figure))}
    assert list(losses) == ["SFT", "DPO", "TGDPO"]
    for figure in losses.values():
        words = re.sub("<[^>]*>", "\n", figure).split("\n")
        assert [word for word in words if word.endswith(("training", "held out"))] == ["training", "held out"]


@needs_chromium
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_of_the_report_is_clipped(demo: Path, width: int, tmp_path: Path) -> None:
    assert_nothing_is_clipped((demo / "report.html").read_text("utf-8"), width, tmp_path)


# ---------------------------------------------------------------- tools.view on what the demo leaves


def viewed(page: Path) -> dict[str, Any]:
    """What a page of tools.view was given."""
    embedded = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.read_text("utf-8"), re.S)
    assert embedded
    data: dict[str, Any] = json.loads(embedded[1])
    return data


def test_a_run_is_shown_with_its_rewards_before_and_after(demo: Path, tmp_path: Path) -> None:
    """Held-out sums over all pairs are the run's own last metrics; numbers on the page have four digits."""
    run("tools.view", str(demo / "aligned" / "policy"), "--validation", "--output", str(tmp_path / "view.html"))
    page = viewed(tmp_path / "view.html")
    names = [number["name"] for number in page["numbers"]]
    last = json.loads((demo / "aligned" / "policy" / "metrics.jsonl").read_text().splitlines()[-1])
    for side in ("chosen", "rejected"):
        of_pairs = np.array([pair[side]["sums"] for pair in page["pairs"]])
        after = of_pairs[:, names.index("reward after")].mean()
        assert after == pytest.approx(last[f"eval/rewards/{side}"], rel=0, abs=2e-3)
        assert of_pairs[:, names.index("reward before")] == pytest.approx(0, abs=1e-4)  # the start is the reference
    sides = [pair[side] for pair in page["pairs"] for side in ("chosen", "rejected")]
    tokens = np.concatenate([side["numbers"][names.index("r̂")] for side in sides])
    assert tokens.mean() == pytest.approx(last["eval/token_rewards/mean"], rel=0, abs=1e-4)


def test_a_folder_of_scores_is_shown_with_its_token_rewards(demo: Path, tmp_path: Path) -> None:
    run("tools.view", str(demo / "aligned" / "scores"), "--pairs", "5", "--output", str(tmp_path / "view.html"))
    page = viewed(tmp_path / "view.html")
    assert len(page["pairs"]) == 5
    assert [number["name"] for number in page["numbers"]] == ["r̂", "reference", "guidance"]
    chosen = page["pairs"][0]["chosen"]
    rewards, reference, guidance = map(np.array, chosen["numbers"])
    beta_r = yaml.safe_load((demo / "aligned" / "scores" / "config.yaml").read_text())["loss"]["beta_r"]
    rounding = beta_r * 0.011  # the page has four digits: log-probs of 10 nats are off by up to 0.005
    assert rewards == pytest.approx(beta_r * (guidance - reference), rel=0, abs=rounding)
    assert max(abs(rewards)) > 3 * rounding
    assert "".join(page["texts"][place] for place in chosen["tokens"]).strip()
