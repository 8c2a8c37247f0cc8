"""What FP8 does to token log-probs, log-ratios, token weights and TGDPO's training, against bf16.

    python -m bench.fp8 [--fast] [--json results/fp8.json] [--picture docs/images/fp8.svg] [--page docs/fp8.md]

A small model learns to answer, a DPO guidance is trained from it, then TGDPO runs in bf16 and with the policy in FP8.
Without a GPU, FP8 is emulated (bench/fp8/emulation.py). With one, and Transformer Engine, the policy is built with
`train.fp8` instead; that way has not run yet. Exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.credit.world import Effort
from bench.fp8.measure import measure, where
from bench.fp8.report import markdown, picture, rows, tables
from bench.machine import machine
from bench.pages import with_tables, write
from bench.process import one_rank
from bench.rows import table
from tgdpo_megatron.quiet import quiet

FULL = Effort(seeds=(1,), validation=200, sft_steps=300, steps=100)
FAST = Effort(seeds=(1,), train=80, validation=36, sft=160, sft_steps=10, steps=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few steps: shows that everything runs, teaches nothing")
    parser.add_argument("--json", type=Path, default=Path("runs/fp8.json"), help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="SVG to write, none by default")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced, none by default")
    parsed = parser.parse_args()
    quiet()
    began = time.process_time()
    summary: dict[str, Any] = {"machine": machine(), "where": where()}
    with tempfile.TemporaryDirectory() as work, one_rank():
        summary |= measure(Path(work) / "world", FAST if parsed.fast else FULL)
    found = rows(summary)
    summary |= {
        "cpu_seconds": round(time.process_time() - began),
        "rows": [row.as_dict() for row in found],
    }
    contents = {parsed.json: json.dumps(summary, indent=1, ensure_ascii=False) + "\n"}
    if parsed.picture:
        contents[parsed.picture] = picture(summary) + "\n"
    if parsed.page:
        contents[parsed.page] = with_tables(parsed.page, tables(summary))
    write(contents)
    print(f"{markdown(summary)}\n\n{table(found)}")
    print(f"{summary['cpu_seconds']} CPU s; written: {', '.join(map(str, contents))}")
    sys.exit(1 if any(row.verdict == "FAIL" for row in found) else 0)


if __name__ == "__main__":
    main()
