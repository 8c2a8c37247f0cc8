"""Small runs that are killed, damaged and moved to other layouts, compared with uninterrupted ones.

It is a program of its own, since its ranks are forks of it: python -m tests.faults.runs FOLDER ROWS.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tests.faults.damage import damage
from tests.faults.kills import MODES, kills, make_world, run_whole
from tests.faults.relayout import relayout
from tests.faults.rows import Row
from tests.support.forked import import_everything

ROOT = Path(__file__).resolve().parents[2]
KILLS = 100
FEW_DAMAGES = 2


def disturbed_runs(folder: Path, only: str, *options: str) -> list[Row]:
    """All rows, made in a process of their own, which shows them as they come.

    Args:
        folder: For the files.
        only: Part of the names or subjects of the rows that are returned. All are made.
        options: Of the program.
    """
    rows = folder / "rows.json"
    subprocess.run([sys.executable, "-m", "tests.faults.runs", folder, rows, *options], cwd=ROOT, check=True)
    found = [Row(**row) for row in json.loads(rows.read_text(encoding="utf-8"))]
    return [row for row in found if only in row.name or only in row.subject]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=Path, help="gets the rows as JSON")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--few", action="store_true", help="a few damages, and no other layouts")
    parsed = parser.parse_args()
    import_everything()
    rows = []
    for row in _rows(parsed.folder, parsed.kills, few=parsed.few):
        rows.append(asdict(row))
        print(f"  {'pass' if row.passed else 'FAIL'} {row.name} {row.note}", flush=True)
    parsed.rows.write_text(json.dumps(rows), encoding="utf-8")


def _rows(folder: Path, number: int, *, few: bool) -> Iterator[Row]:
    world = make_world(folder)
    whole = {mode: run_whole(world, mode) for mode in MODES}
    yield from kills(world, whole, number)
    yield from damage(world, whole["cached"], FEW_DAMAGES if few else None)
    if not few:
        yield from relayout(world, whole["cached"])


if __name__ == "__main__":
    main()
