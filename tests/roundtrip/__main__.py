"""python -m tests.roundtrip: prints the table, exits with 1 if a row fails."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import tests.roundtrip
from tests.roundtrip.table import run, table
from tgdpo_megatron.quiet import quiet


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(
        description=tests.roundtrip.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="run rows whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), parsed.only)
    print(table(results))
    if parsed.json:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    sys.exit(0 if results and all(result.passed for result in results) else 1)


if __name__ == "__main__":
    main()
