"""The speed benchmark: every row in one run, as a table, JSON and a picture.

    python -m bench.run [--only FILE] [--json results/bench.json] [--picture docs/images/bench.svg]

Ratios only, of numbers measured on this machine in this run. Each file of rows runs as a process of its own, one
after the other, at one thread. Exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.rows import Row, read_rows, table

FILES = ("counts", "head", "steps", "trace", "trl")
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"run one file of rows: {', '.join(FILES)}")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--picture", type=Path, help="draw them here, as SVG")
    parsed = parser.parse_args()
    if parsed.only and parsed.only not in FILES:
        parser.error(f"--only {parsed.only}: no such file of rows; choose from {', '.join(FILES)}")
    rows: list[Row] = []
    for name in tqdm([parsed.only] if parsed.only else FILES, desc="bench", unit="file"):
        began = time.monotonic()
        rows += _run(name)
        tqdm.write(f"bench.{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(table(rows))
    if parsed.json:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps({"machine": machine(), "rows": [row.as_dict() for row in rows]}, indent=1))
    if parsed.picture:
        parsed.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, parsed.picture)
    sys.exit(1 if any(row.verdict == "FAIL" for row in rows) else 0)


def _run(name: str) -> list[Row]:
    """The rows of one file; a file that breaks is a failed row, and the others still run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, "-W", "ignore", "-m", f"bench.{name}", "--rows", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        if done.returncode or not output.is_file():
            print(done.stderr[-4000:], file=sys.stderr)
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [Row(f"bench.{name}", None, broke=True, note=f"broke: {reason}")]
        return read_rows(output)


def machine() -> dict[str, Any]:
    """Where the numbers are from."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def draw(rows: list[Row], path: Path) -> None:
    """Above, how many times as long others take for our step; below, how much of each target is used up."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    steps = [(row.name.replace(" / ours", "\n/ ours"), row.measured) for row in rows if _is_step(row) and row.measured]
    shown = [(row, row.measured, row.target) for row in rows if row.measured is not None and row.target]
    heights = [0.5 * len(steps) + 0.9, 0.3 * len(shown) + 0.9]
    figure, (above, below) = pyplot.subplots(2, figsize=(10, sum(heights)), height_ratios=heights, layout="constrained")
    above.barh(range(len(steps)), [times for _, times in steps], color="#2a6f97")
    above.set_yticks(range(len(steps)), [name for name, _ in steps], fontsize=8)
    above.axvline(1, color="black", linewidth=1)
    for place, (_, times) in enumerate(steps):
        above.text(times, place, f" {times:.2f}×", va="center", fontsize=9)
    above.set_title("CPU time of a whole step, ours = 1: the line", fontsize=10, loc="left")

    used = [measured / target if row.at_most else target / measured for row, measured, target in shown]
    below.barh(
        range(len(shown)), used, color=["#2a7f62" if row.verdict == "pass" else "#b3362b" for row, _, _ in shown]
    )
    below.axvline(1, color="black", linewidth=1)
    below.set_yticks(range(len(shown)), [row.name for row, _, _ in shown], fontsize=8)
    for place, (row, measured, target) in enumerate(shown):
        words = f" {measured:.3g} (target {'≤' if row.at_most else '≥'} {target:g})"
        below.text(max(1.0, used[place]), place, words, va="center", fontsize=7)
    below.set_xlim(0, 1.35 * max([1.0, *used]))
    below.set_title(
        "share of each target used up: the line is the target, left of it is better", fontsize=10, loc="left"
    )
    for axes in (above, below):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _is_step(row: Row) -> bool:
    """Whether a row tells how long someone else's step takes, in our steps."""
    return "step" in row.name and " / ours" in row.name


if __name__ == "__main__":
    main()
