"""The GPU benchmark's programs run from end to end where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


def test_the_whole_gpu_benchmark_runs_in_rehearsal_and_asks_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.gpu", "--rehearse", "--json", str(tmp_path / "gpu.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["verdict"] for row in rows} == {"–"}, "broken or skipped rows, or targets"
    assert all(row["note"].startswith("rehearsal") for row in rows)
    for words in (
        "matrix product",
        "head, rate",
        "head, time, fp32 sums",
        "step, cached, fp32 sums",
        "MFU",
        "HuggingFace live",
        "FP8 blockwise",
        "memory",
        "idle share",
    ):
        assert any(words in row["name"] for row in rows), words


def test_a_rehearsal_does_not_write_results() -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--rehearse", "--json", "results/gpu.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "do not belong in results/" in refused.stderr
