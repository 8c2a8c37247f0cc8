"""python -m tests.faults: prints what each fault brought, exits with 1 if one was not met as it should be."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import tests.faults
from tests.faults.fuzz import foreign_checkpoints
from tests.faults.inputs.table import bad_inputs
from tests.faults.rows import Row, table
from tests.faults.runs import disturbed_runs
from tgdpo_megatron.quiet import quiet

BESIDE = ("inputs", "checkpoints")
"""Parts that run one after another beside the runs. They mostly wait for one process."""
PARTS: dict[str, Callable[[Path, str], list[Row]]] = {
    "inputs": bad_inputs,
    "checkpoints": foreign_checkpoints,
    "runs": disturbed_runs,
}
"""Name of a part -> what makes its rows of a folder for files and a text that their names must contain."""


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(
        description=tests.faults.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", action="store_true", help="bad inputs; without such an option all parts run")
    parser.add_argument("--checkpoints", action="store_true", help="checkpoints of strangers, damaged in many ways")
    parser.add_argument("--runs", action="store_true", help="runs that are killed, damaged, moved to other layouts")
    parser.add_argument("--only", default="", help="run rows whose name or subject contains this")
    parser.add_argument("--json", type=Path, help="also write the rows here, beside those of other parts")
    parsed = parser.parse_args()
    wanted = [part for part in PARTS if getattr(parsed, part)] or list(PARTS)
    lanes = [[part for part in wanted if (part in BESIDE) == beside] for beside in (True, False)]
    with ThreadPoolExecutor(len(lanes)) as pool:
        found = dict(chain.from_iterable(pool.map(lambda lane: [_made(part, parsed.only) for part in lane], lanes)))
    if parsed.json:
        known = json.loads(parsed.json.read_text(encoding="utf-8")) if parsed.json.is_file() else {}
        known |= {part: [asdict(row) for row in rows] for part, rows in found.items()}
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps(known, indent=1, ensure_ascii=False), encoding="utf-8")
    rows = [row for part in found.values() for row in part]
    sys.exit(0 if rows and all(row.passed for row in rows) else 1)


def _made(part: str, only: str) -> tuple[str, list[Row]]:
    """A part and its rows, which are printed."""
    with tempfile.TemporaryDirectory() as folder:
        rows = PARTS[part](Path(folder), only)
    print(f"{part}\n{table(rows)}\n", flush=True)
    return part, rows


if __name__ == "__main__":
    main()
