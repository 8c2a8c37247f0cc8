"""The command line of the programs that print a table of rows, each of which passes or fails."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tgdpo_megatron.quiet import quiet


def program(description: str | None, run: Callable[[Path, str], list[Any]], table: Callable[[list[Any]], str]) -> None:
    """Run the rows, print the table, write it as JSON where that is asked for, and exit with 1 if a row fails.

    Args:
        run: (folder for files, text in the names of rows) -> results, which have `passed`.
        table: The results in words.
    """
    quiet()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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
