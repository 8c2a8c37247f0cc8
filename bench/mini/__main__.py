"""The paper in miniature: does TGDPO do here what its paper says?

    python -m bench.mini [--fast] [--json results/mini.json] [--picture docs/images/mini.svg] [--page docs/miniature.md]

A world with a known reward: a start model is fine-tuned, answers prompts, a learned scorer ranks the answers, and DPO,
SimPO and TGDPO train on the pairs, each tuned with as many runs on a world of its own. Everything runs through the
public commands. What decides stands in bench/mini/rules.py, and docs/miniature.md explains it.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from bench.machine import machine
from bench.mini.compare import compare
from bench.mini.report import markdown, picture, summarise, tables
from bench.mini.stages import Effort
from bench.pages import with_tables, write

FAST = Effort(
    seeds=(1, 2),
    sft=300,
    sft_steps=40,
    labels=264,
    train=72,
    held_out=12,
    epoch=2,
    epochs=2,
    checked=(2, 4),
    configurations=2,
    answers=3,
    judged=2,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little of everything: shows that it runs, teaches nothing")
    parser.add_argument("--json", type=Path, default=Path("runs/mini.json"), help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="SVG to write, none by default")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced, none by default")
    parser.add_argument("--processes", type=int, default=2, help="jobs at the same time (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep all worlds, runs and logs there")
    parsed = parser.parse_args()
    effort = FAST if parsed.fast else Effort()
    began = time.monotonic()
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(parsed.keep or Path(folder), effort, parsed.processes)
    took = {"seconds": round(time.monotonic() - began), "cpu_seconds": round(_cpu_seconds())}

    summary = {"machine": where, **took, **summarise(found, effort)}
    summary = json.loads(json.dumps(summary))  # as whoever reads the file has it
    contents = {parsed.json: json.dumps(summary, ensure_ascii=False) + "\n"}
    if parsed.picture:
        contents[parsed.picture] = picture(summary) + "\n"
    if parsed.page:
        contents[parsed.page] = with_tables(parsed.page, tables(summary))
    write(contents)
    print(markdown(summary))
    print(f"\n{took['seconds']} s, {took['cpu_seconds']} CPU s; written: {', '.join(map(str, contents))}")


def _cpu_seconds() -> float:
    """Of this process and those it waited for."""
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime


if __name__ == "__main__":
    main()
