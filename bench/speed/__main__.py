"""The speed benchmark: every row in one run, as a table, JSON and a picture.

    python -m bench.speed [--only FILE] [--json results/bench.json] [--picture docs/images/bench.svg]

Ratios of numbers measured on this machine in this run, and one time that is bounded in seconds. Each file of rows runs
as a process of its own, one after the other, at one thread. Exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from bench.files import run_file, write_results
from bench.rows import Row, table
from bench.speed import FILES
from bench.speed.picture import draw
from tgdpo_megatron.quiet import quiet


def main() -> None:
    quiet()
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
        rows += run_file(f"bench.speed.{name}")
        tqdm.write(f"bench.speed.{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(table(rows))
    if parsed.json:
        write_results(rows, parsed.json)
    if parsed.picture:
        parsed.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, parsed.picture)
    sys.exit(1 if any(row.verdict == "FAIL" for row in rows) else 0)


if __name__ == "__main__":
    main()
