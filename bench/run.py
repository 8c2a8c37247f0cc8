"""The speed benchmark: every row in one run, as a table, JSON and a picture.

    python -m bench.run [--only FILE] [--json results/bench.json] [--picture docs/images/bench.svg]

Ratios only, of numbers measured on this machine in this run. Each file of rows runs as a process of its own, one
after the other, at one thread. Exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.rows import Row, read_rows, table, write_whole

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
        rows += run_file(name)
        tqdm.write(f"bench.{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(table(rows))
    if parsed.json:
        write_results(rows, parsed.json)
    if parsed.picture:
        parsed.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, parsed.picture)
    sys.exit(1 if any(row.verdict == "FAIL" for row in rows) else 0)


def run_file(name: str, *, seconds: float | None = None, **environment: str) -> list[Row]:
    """The rows of one file; a file that breaks is a failed row after those it had, and the others still run.

    Args:
        seconds: A file that takes longer is stopped, and counts as broken.
        environment: Variables to set for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "rows.json", Path(folder) / "stderr"
        command = [sys.executable, "-W", "ignore", "-m", f"bench.{name}", "--rows", str(output)]
        common = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as said:
            try:
                subprocess.run(
                    command,
                    env={**os.environ, **common, **environment},
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    timeout=seconds,
                    check=True,
                )
            except subprocess.TimeoutExpired:
                reason = f"stopped after {seconds:.0f} s"
            except subprocess.CalledProcessError:
                reason = "broke: " + (log.read_text().strip().splitlines() or ["no message"])[-1]
            else:
                return read_rows(output)
        print(log.read_text()[-4000:], file=sys.stderr)
        kept = read_rows(output) if output.is_file() else []
        return [*kept, Row(f"bench.{name}", None, broke=True, note=reason)]


def write_results(rows: list[Row], path: Path) -> None:
    """All rows, with the machine they are from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "rows": [row.as_dict() for row in rows]}
    write_whole(path, json.dumps(results, indent=1))


def machine() -> dict[str, Any]:
    """Where the numbers are from. The commit: git's, or what the environment variable TGDPO_COMMIT says without it."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        **_gpu(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "commit": _commit() or os.environ.get("TGDPO_COMMIT", "unknown: not a git checkout"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    if shutil.which("git") is None:
        return ""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return described.stdout.strip()


def _gpu() -> dict[str, Any]:
    """Name, memory and driver of the GPU, and the CUDA and Transformer Engine above it; nothing without one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    if not lines:
        return {}
    import torch

    found = dict(zip(("gpu", "gpu memory", "driver"), map(str.strip, lines[0].split(",")), strict=False))
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    with contextlib.suppress(PackageNotFoundError):
        found["transformer-engine"] = version("transformer-engine")
    return found


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
