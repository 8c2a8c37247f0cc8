"""python -m tests.versions: prints the table, exits with 1 if a row fails.

The results are kept in FILE.tmp after each row, and become FILE at the end: until then FILE stays what the pages say.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import tests.versions
from bench.machine import machine
from tests.versions.matrix import CHECKS, NAMES, Result, as_shown, run_matrix, table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=tests.versions.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="take environments whose name contains this, such as 0.18.2")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the results here")
    parser.add_argument("--again", action="store_true", help="keep the tests that passed in FILE.tmp")
    parsed = parser.parse_args()
    if parsed.again and not parsed.json:
        parser.error("--again needs --json, which says whose results to keep")
    unfinished = parsed.json and parsed.json.with_name(f"{parsed.json.name}.tmp")
    kept = _passed(unfinished) if parsed.again else []
    results: list[Result] = [*kept]
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        for result in run_matrix(Path(folder), parsed.only, kept):
            results.append(result)
            if unfinished:
                unfinished.parent.mkdir(parents=True, exist_ok=True)
                found = {"machine": where, "checks": NAMES, "rows": [asdict(row) for row in as_shown(results)]}
                unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if unfinished:
        unfinished.replace(parsed.json)
    print(table(results))
    sys.exit(0 if results and all(result.passed for result in results) else 1)


def _passed(unfinished: Path) -> Sequence[Result]:
    """The tests that passed in a run that was stopped. Environments and their checkpoints are made again."""
    rows = [Result(**row) for row in json.loads(unfinished.read_text(encoding="utf-8"))["rows"]]
    return [row for row in rows if row.passed and row.check in CHECKS]


if __name__ == "__main__":
    main()
