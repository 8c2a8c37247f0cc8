"""Files of a run that grow by a line of JSON for a step, and that agree with the checkpoint from which it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tgdpo_megatron.checkpoint.failures import NotWrittenError, writable

SAMPLES, SKIPPED, SPIKES = "samples.jsonl", "skipped.jsonl", "spikes.jsonl"
"""Files in the folder of a run: the pairs of each step with its loss, the steps that were skipped, and those whose
loss leapt."""


class Journal:
    """One such file, written by one rank. It is there once it has a line.

    The rank that writes must not end in the midst of a step, in which the others wait for it. So a refusal of the
    operating system is kept, for all ranks to end together, and nothing more is written.

    Args:
        first: Optimizer steps done before this process. Lines that an interrupted run wrote after them are dropped.

    Attributes:
        before: The lines that were kept.
        refused: The sentence about a line that could not be written; None so far.

    Raises:
        NotWrittenError: The operating system refuses the file when it is opened.
    """

    def __init__(self, path: Path, *, first: int) -> None:
        self.path = path
        self.before = lines_until(first, path)
        self.refused: str | None = None
        if path.is_file():
            with self._writable():
                self._replace(self.before)

    def write(self, step: int, content: Mapping[str, Any]) -> None:
        """Add a line about an optimizer step, counted from 1."""
        line = _line(step, content)
        if self.refused is None:
            with self._refusal_kept(), self._writable(), self.path.open("a", encoding="utf-8") as file:
                file.write(line)

    def complete(self, step: int, content: Mapping[str, Any]) -> None:
        """Add to the line of the step from which the run goes on; a line of its own where that has none."""
        last = json.loads(self.before[-1]) if self.before else {}
        earlier, last = (self.before[:-1], last) if last.get("iteration") == step else (self.before, {})
        self.before = [*earlier, _line(step, {**last, **content})]
        with self._refusal_kept(), self._writable():
            self._replace(self.before)

    def _replace(self, lines: list[str]) -> None:
        part = self.path.with_suffix(".tmp")
        part.write_text("".join(lines), encoding="utf-8")
        os.replace(part, self.path)  # a run that is killed now keeps its lines

    def _writable(self) -> contextlib.AbstractContextManager[None]:
        return writable(f"{self.path}: this file of the run")

    @contextlib.contextmanager
    def _refusal_kept(self) -> Iterator[None]:
        try:
            yield
        except NotWrittenError as error:
            self.refused = str(error)


def _line(step: int, content: Mapping[str, Any]) -> str:
    return json.dumps({"iteration": step, **content}, allow_nan=False) + "\n"


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
