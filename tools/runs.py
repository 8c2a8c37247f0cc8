"""List runs in a table: their last step, and what their newest evaluation found on held-out pairs.

    python -m tools.runs FOLDER [FOLDER ...]

A folder is that of a run, or one that holds such folders, as a sweep does. The values are those of metrics.jsonl; a run
without an evaluation has none.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tgdpo_megatron.errors import CommandLine, UserError, one_sentence_errors
from tgdpo_megatron.report.journal import lines_until

COLUMNS = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")


def runs_in(folder: Path) -> list[Path]:
    """The folder itself where it is that of a run, else those of the runs in it.

    Raises:
        UserError: There is none.
    """
    found = sorted(path.parent for path in (*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")))
    if not found:
        raise UserError(f"{folder}: neither it nor a folder in it holds a metrics.jsonl; give the folder of a sweep.")
    return found


def row(run: Path) -> list[str]:
    """The cells of a run: its folder, its last step, and COLUMNS."""
    lines: list[dict[str, float]] = [json.loads(line) for line in lines_until(sys.maxsize, run / "metrics.jsonl")]
    evaluated = next((line for line in reversed(lines) if COLUMNS[0] in line), {})
    steps = str(lines[-1]["iteration"]) if lines else "0"
    return [str(run), steps, *(f"{evaluated[name]:.4f}" if name in evaluated else "-" for name in COLUMNS)]


def main() -> None:
    with one_sentence_errors():
        parser = CommandLine(
            prog="python -m tools.runs",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
        rows = [["run", "step", *COLUMNS]]
        rows += [row(run) for folder in parser.parse_args().folders for run in runs_in(folder)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for name, *cells in rows:
            numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            print(f"{name:<{widths[0]}}", *numbers, sep="  ")


if __name__ == "__main__":
    main()
