"""What rounding logits does is measured from end to end, on few tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.logits.report import BEGIN, END

ROOT = Path(__file__).resolve().parents[2]


def test_the_fast_variant_passes_and_fills_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\n{END}\n\nafter\n")
    command = [sys.executable, "-W", "ignore", "-m", "bench.logits", "--fast"]
    command += ["--json", str(tmp_path / "logits.json"), "--page", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "logits.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["pass", "pass"]
    filled = page.read_text()
    assert filled.startswith("before") and filled.endswith("after\n") and "TGDPO's weight of a token" in filled
