"""The GPU benchmark: every file of rows on one GPU, as a table and JSON.

    python -m bench.gpu [--only FILE,…] [--json results/gpu.json] [--rehearse]

Each file of rows is a process of its own with a time budget; one that breaks or takes longer is a failed row, and the
rest still runs. Results are written after every file, so that a run that is stopped keeps what it has. Files are run
with Transformer Engine where it is installed; some also as if it were not. Exits with 1 if a row fails.

--rehearse runs the same programs on the CPU at tiny sizes, to see that they work before there is a GPU. Its rows
have no targets, and results/ does not take them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bench.files import run_file, write_results
from bench.machine import ROOT
from bench.rows import Row, table
from tgdpo_megatron.quiet import quiet

HIDES_TRANSFORMER_ENGINE = Path(__file__).with_name("without_transformer_engine")


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        file: Of rows, in this folder.
        seconds: After which it is given up; by estimate it takes an H200 about half of that.
        local: Run as if Transformer Engine were not installed.
    """

    file: str
    seconds: int
    local: bool = False

    @property
    def name(self) -> str:
        return f"{self.file}, local layers" if self.local else self.file


PARTS = (  # what matters most first
    Part("rate", 30),
    Part("head", 45),
    Part("steps", 120),
    Part("padded", 110),
    Part("fp8", 150),
    Part("memory", 80),
    Part("profile", 80),
    Part("steps", 120, local=True),
    Part("memory", 80, local=True),
)


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(part.file for part in PARTS))
    parser.add_argument("--only", default=",".join(names), help=f"files of rows, of {', '.join(names)}")
    parser.add_argument("--json", type=Path, help="write all rows here, after every file")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parsed = parser.parse_args()
    asked = parsed.only.split(",")
    if unknown := set(asked) - set(names):
        parser.error(f"--only: no such file of rows as {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    if parsed.json and parsed.json.exists() and asked != names:
        parser.error(f"--only: {parsed.json} is there, and its other rows would be lost; choose another --json")
    if parsed.rehearse:
        if parsed.json and parsed.json.resolve().is_relative_to(ROOT / "results"):
            parser.error("--rehearse: its numbers mean nothing and do not belong in results/; choose another --json")
    elif not _has_gpu():
        parser.error("torch sees no GPU here; --rehearse runs the same programs on the CPU at tiny sizes")
    rows = _run([part for part in PARTS if part.file in asked], parsed.json, rehearse=parsed.rehearse)
    print(table(rows))
    sys.exit(1 if any(row.verdict == "FAIL" for row in rows) else 0)


def _run(parts: list[Part], results: Path | None, *, rehearse: bool) -> list[Row]:
    if rehearse or not _has_transformer_engine():
        parts = [part for part in parts if not part.local]  # they would be the same
    rows: list[Row] = []
    started = time.monotonic()
    for part in parts:
        began = time.monotonic()
        environment = {}
        if rehearse:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if part.local or rehearse:
            environment["PYTHONPATH"] = f"{HIDES_TRANSFORMER_ENGINE}:{os.environ.get('PYTHONPATH', '')}"
        found = run_file(f"bench.gpu.{part.file}", seconds=part.seconds, **environment)
        rows += [replace(row, name=f"{row.name}, local layers") if row.broke and part.local else row for row in found]
        took, since = time.monotonic() - began, time.monotonic() - started
        print(f"{part.name}: {took:.0f} s of {part.seconds}, {since:.0f} s in all", file=sys.stderr, flush=True)
        if results:
            write_results(rows, results)
    return rows


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


if __name__ == "__main__":
    main()
