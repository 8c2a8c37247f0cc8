"""python -m tests.versions: prints the table, exits with 1 if a row fails.

The results are written after each row, so that a run that is stopped keeps what it has.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import tests.versions
from bench.machine import machine
from tests.versions.matrix import NAMES, as_shown, run_matrix, table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=tests.versions.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="take environments whose name contains this, such as 0.18.2")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parsed = parser.parse_args()
    results = []
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        for result in run_matrix(Path(folder), parsed.only):
            results.append(result)
            if parsed.json:
                parsed.json.parent.mkdir(parents=True, exist_ok=True)
                found = {"machine": where, "checks": NAMES, "rows": [asdict(row) for row in as_shown(results)]}
                parsed.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    sys.exit(0 if results and all(result.passed for result in results) else 1)


if __name__ == "__main__":
    main()
