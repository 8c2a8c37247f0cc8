"""Files of a run that grow by a line of JSON for a step, and that agree with the checkpoint from which it goes on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAMPLES, SKIPPED, SPIKES = "samples.jsonl", "skipped.jsonl", "spikes.jsonl"
"""Files in the folder of a run: the pairs of each step, the steps that were skipped, and those whose loss leapt."""


class Journal:
    """One such file, written by one rank. It is there once it has a line.

    Args:
        first: Optimizer steps done before this process. Lines that an interrupted run wrote after them are dropped.
    """

    def __init__(self, path: Path, *, first: int) -> None:
        self.path = path
        if path.is_file():
            part = path.with_suffix(".tmp")
            part.write_text("".join(lines_until(first, path)), encoding="utf-8")
            os.replace(part, path)  # a run that is killed now keeps its lines

    def write(self, step: int, content: Mapping[str, Any]) -> None:
        """Add a line about an optimizer step, counted from 1."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": step, **content}, allow_nan=False) + "\n")


def lines_until(step: int, path: Path) -> list[str]:
    """The lines up to a step. A line that a killed run left incomplete is dropped.

    Other lines that this program did not write are dropped as well, with a sentence on stderr.
    """
    if not step or not path.is_file():
        return []
    kept, foreign = [], []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["iteration"] <= step:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                foreign.append(number)
    if foreign:
        more = f", and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        print(f"warning: {path}: line {foreign[0]}{more}: not of this program; dropped.", file=sys.stderr)
    return kept
