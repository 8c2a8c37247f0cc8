"""The speed benchmark: every row in one run, as a table, JSON and a picture.

    python -m bench.run [--only TEXT] [--json results/bench.json] [--picture results/bench.svg]

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

from bench.rows import Row, read_rows, table

FILES = ("counts", "head", "steps", "trace", "trl")
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"run one file of rows: {', '.join(FILES)}")
    parser.add_argument("--json", type=Path, default=Path("results/bench.json"))
    parser.add_argument("--picture", type=Path, default=Path("results/bench.svg"))
    parsed = parser.parse_args()
    if parsed.only and parsed.only not in FILES:
        parser.error(f"--only {parsed.only}: no such file of rows; choose from {', '.join(FILES)}")
    rows: list[Row] = []
    for name in [parsed.only] if parsed.only else FILES:
        began = time.monotonic()
        rows += _run(name)
        print(f"bench.{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    parsed.json.parent.mkdir(parents=True, exist_ok=True)
    parsed.json.write_text(json.dumps({"machine": machine(), "rows": [row.as_dict() for row in rows]}, indent=1))
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
            return [Row(f"bench.{name}", 1.0, target=0.0, note=f"broke: {reason}")]
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
    """How far each row is beyond its target: measured / target, or its inverse for lower bounds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = [(row, row.measured, row.target) for row in rows if row.measured is not None and row.target]
    used = [m / t if row.at_most else t / m for row, m, t in shown]
    colours = ["#2a7f62" if row.verdict == "pass" else "#b3362b" for row, _, _ in shown]
    figure, axes = pyplot.subplots(figsize=(10, 0.32 * len(shown) + 1.2), layout="constrained")
    axes.barh(range(len(shown)), used, color=colours)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [row.name for row, _, _ in shown], fontsize=8)
    for place, (row, measured, target) in enumerate(shown):
        label = f" {measured:.3g} (target {'≤' if row.at_most else '≥'} {target:g})"
        axes.text(max(1.0, used[place]), place, label, va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max([1.0, *used]))
    axes.set_xlabel("share of the target used up; the line is the target, left of it is better")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
