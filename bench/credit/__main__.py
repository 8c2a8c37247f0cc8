"""The token-credit benchmark: do token rewards find the wrong tokens, and what do methods make of them?

    python -m bench.credit [--fast] [--json runs/credit.json] [--report runs/credit.html] [--picture FILE.svg]

The demo's generator knows which tokens are wrong. Every source of token rewards is ranked against that; every method
trains from the same start on the same pairs for the same steps, with several seeds. Runs go through the product's
engine, one to a process at one thread, as many processes as --processes says.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from bench.credit.compare import compare
from bench.credit.report import as_text, headlines, methods_table, page, picture, sources_table, summarise
from bench.credit.world import Effort
from bench.machine import machine

FULL = Effort(seeds=(1, 2, 3, 4, 5))
FAST = Effort(seeds=(1, 2), train=80, validation=24, sft=120, sft_steps=6, steps=4, eval_interval=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="two seeds, few steps: shows that everything runs")
    parser.add_argument("--json", type=Path, default=Path("runs/credit.json"), help="default: %(default)s")
    parser.add_argument("--report", type=Path, default=Path("runs/credit.html"), help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="SVG to write, none by default")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parsed = parser.parse_args()
    effort = FAST if parsed.fast else FULL
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        prepared, runs = compare(Path(work), effort, parsed.processes)
    seconds = time.monotonic() - began

    where = machine()
    took = {"seconds": round(seconds), "cpu_seconds": round(_cpu_seconds())}
    summary = {"machine": where, **took, **summarise(prepared, runs, effort)}
    settings = [(name, str(value)) for name, value in (where | took).items()]
    contents = {parsed.json: json.dumps(summary, ensure_ascii=False), parsed.report: page(summary, settings)}
    if parsed.picture:
        contents[parsed.picture] = picture(summary)
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")
    print(f"{as_text(sources_table(summary))}\n\n{as_text(methods_table(summary))}\n")
    print("\n".join(headlines(summary)))
    print(f"{took['seconds']} s, {took['cpu_seconds']} CPU s; written: {', '.join(map(str, contents))}")


def _cpu_seconds() -> float:
    """Of this process and those it waited for: what a machine that others use too does not change much."""
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime


if __name__ == "__main__":
    main()
