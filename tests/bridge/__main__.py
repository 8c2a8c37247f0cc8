"""python -m tests.bridge: prints the table, exits with 1 if a row fails."""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import tests.bridge
from bench.machine import machine
from tests.bridge.table import run, table, versions
from tgdpo_megatron.quiet import quiet

if __name__ == "__main__":
    quiet()
    parser = argparse.ArgumentParser(
        description=tests.bridge.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, required=True, help="of the environment with Megatron-Bridge")
    parser.add_argument("--only", default="", help="run families whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parsed = parser.parse_args()
    packages = versions(parsed.python.absolute())
    with tempfile.TemporaryDirectory() as folder:
        results = run(parsed.python.absolute(), Path(folder), parsed.only)
    print(table(results, packages))
    if parsed.json:
        found = {"machine": machine(), "of bridge": packages, "rows": [asdict(one) for one in results]}
        parsed.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if results and all(one.passed for one in results) else 1)
