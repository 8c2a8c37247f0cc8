"""docs/measurements.md says of unrounded logits what results/logits.json says, and the emulation does what it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.logits.measure import CANDIDATES, MEAN, SPREAD, Effort, _hidden_states, _output_matrix, exact_logps
from bench.logits.report import NAME, rows, tables
from bench.pages import with_tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/measurements.md"


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return json.loads((ROOT / "results/logits.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the program's fast variant wrote to: a process of its own, which is a job of one rank."""
    folder = tmp_path_factory.mktemp("logits")
    (folder / "page.md").write_text(f"before\n\n<!-- {NAME}: begin -->\n<!-- {NAME}: end -->\n\nafter\n")
    command = [sys.executable, "-W", "ignore", "-m", "bench.logits", "--fast"]
    command += ["--json", str(folder / "logits.json"), "--page", str(folder / "page.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def small(program: Path) -> dict[str, Any]:
    found = json.loads((program / "logits.json").read_text())
    return found["vocabularies"]["32000"]


def test_the_program_fills_its_page(program: Path) -> None:
    filled = (program / "page.md").read_text()
    assert filled.startswith("before") and filled.endswith("after\n") and "TGDPO's weight of a token" in filled


def test_the_tables_of_the_page_are_those_of_the_results(summary: dict[str, Any]) -> None:
    assert with_tables(PAGE, tables(summary)) == PAGE.read_text(encoding="utf-8")


def test_the_results_are_of_a_whole_run_of_a_commit(summary: dict[str, Any]) -> None:
    assert "dirty" not in summary["machine"]["commit"]
    assert [int(vocabulary) for vocabulary in summary["vocabularies"]] == list(Effort().vocabularies)
    assert summary["effort"]["pairs"] == Effort().pairs


def test_the_verdicts_in_the_results_are_those_of_their_numbers(summary: dict[str, Any]) -> None:
    assert [row.as_dict() for row in rows(summary)] == summary["rows"]
    assert {row["verdict"] for row in summary["rows"]} == {"pass"}


def test_the_page_says_what_the_logits_follow_from(summary: dict[str, Any]) -> None:
    """The log-sum-exp of that many normal logits."""
    for vocabulary in summary["vocabularies"]:
        assert f"{MEAN + math.log(int(vocabulary)) + SPREAD**2 / 2:.1f} for" in PAGE.read_text(encoding="utf-8")


def test_made_up_logits_have_the_sizes_they_shall_have() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = _output_matrix(8000, 512, generator)
    logits = _hidden_states(64, weight, generator) @ weight.float().t()
    assert float(logits.mean()) == pytest.approx(MEAN, abs=0.05)
    crowd = logits.sort(dim=1).values[:, :-CANDIDATES]
    assert float(crowd.std()) == pytest.approx(SPREAD, rel=0.2)  # candidates add a little to the states' length
    assert float(logits.amax(dim=1).mean() - crowd.logsumexp(dim=1).mean()) > 3


def test_rounded_logits_lose_what_bf16_steps_say_and_unrounded_ones_a_thousand_times_less(
    small: dict[str, Any],
) -> None:
    """The label's logit is off by at most half a step; so is each of those that the log-sum-exp is made of."""
    largest = 2 * 2**-9 * 2 ** math.ceil(math.log2(small["logits"]["largest"] + 8))
    assert 1e-3 < small["head"]["rounded"]["max"] < largest
    assert small["head"]["unrounded"]["max"] < 1e-3 * small["head"]["rounded"]["max"]


def test_what_is_left_is_the_rounding_of_the_hidden_states(small: dict[str, Any]) -> None:
    errors = small["errors"]
    for name in ("logp", "log_ratio", "weight"):
        assert 0 < errors["unrounded"][name]["std"] < errors["rounded"][name]["std"], name


def test_the_weights_noise_is_that_of_the_log_ratio_times_alpha_and_beta(small: dict[str, Any]) -> None:
    """f(r̂) = 1 ± α β_r (log-ratio), with TGDPO's α = 0.5 and β_r = 0.1."""
    for kind in small["errors"].values():
        assert kind["weight"]["size"] == pytest.approx(0.5 * 0.1 * kind["log_ratio"]["size"], rel=1e-6)


def test_exact_log_probs_are_those_of_torchs_dense_log_softmax() -> None:
    states, weight = torch.randn(4, 8).bfloat16(), torch.randn(20_000, 8).bfloat16()
    labels = torch.tensor([0, 5, 16_384, 19_999])
    whole = torch.nn.functional.cross_entropy(states.double() @ weight.double().t(), labels, reduction="none")
    torch.testing.assert_close(exact_logps(states, weight, labels), -whole, rtol=1e-12, atol=1e-12)
