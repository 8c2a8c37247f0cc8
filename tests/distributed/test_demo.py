"""The demo runs from nothing to its report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_fast_demo_writes_a_report_of_three_models(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tools.demo", "--fast", "--output", str(tmp_path / "demo")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "TGDPO (after)" in page and "<svg" in page
    numbers = json.loads((tmp_path / "demo" / "demo.json").read_text())["comparison"]
    assert len(numbers) == 3
    assert all(math.isfinite(value) for model in numbers.values() for value in model.values())
