"""What rounding logits to bf16 does to token log-probs, to r̂ and to TGDPO's weights, against fp32.

    python -m bench.logits [--fast] [--json results/logits.json] [--page docs/measurements.md]

Emulated on the CPU: a GPU's tensor cores add products of bf16 numbers up in fp32, as an fp32 product of the same
numbers does. Exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.logits.measure import Effort, measure
from bench.logits.report import markdown, rows, tables
from bench.machine import machine
from bench.pages import with_tables, write
from bench.process import one_rank
from bench.rows import table
from tgdpo_megatron.quiet import quiet

FAST = Effort(pairs=2, response=32, width=256, vocabularies=(32_000,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few tokens: shows that everything runs")
    parser.add_argument("--json", type=Path, default=Path("runs/logits.json"), help="default: %(default)s")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced, none by default")
    parsed = parser.parse_args()
    quiet()
    began = time.process_time()
    summary: dict[str, Any] = {"machine": machine()}
    with one_rank():
        summary |= measure(FAST if parsed.fast else Effort())
    found = rows(summary)
    summary |= {"cpu_seconds": round(time.process_time() - began), "rows": [row.as_dict() for row in found]}
    contents = {parsed.json: json.dumps(summary, indent=1, ensure_ascii=False) + "\n"}
    if parsed.page:
        contents[parsed.page] = with_tables(parsed.page, tables(summary))
    write(contents)
    print(f"{markdown(summary)}\n\n{table(found)}")
    print(f"{summary['cpu_seconds']} CPU s; written: {', '.join(map(str, contents))}")
    sys.exit(1 if any(row.verdict == "FAIL" for row in found) else 0)


if __name__ == "__main__":
    main()
