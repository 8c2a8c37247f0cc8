"""A row of the table of faults: what was done, and what the program said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        subject: What it belongs to; rows of one subject stand together.
        name: What was done, in words.
        said: What the program said.
        seconds: How long it took.
        note: What was wrong with it; empty where it passed.
    """

    subject: str
    name: str
    passed: bool
    said: str
    seconds: float = 0.0
    note: str = ""


def table(rows: Sequence[Row]) -> str:
    """Rows in words, under the names of their subjects."""
    lines: list[str] = []
    for place, row in enumerate(rows):
        if place == 0 or row.subject != rows[place - 1].subject:
            lines += ["", row.subject]
        lines.append(f"  {'pass' if row.passed else 'FAIL'} {row.seconds:5.1f} s  {row.name}")
        lines.append(f"         {row.said}")
        lines += [f"         FAIL: {row.note}"] if row.note else []
    passed = sum(row.passed for row in rows)
    return "\n".join([*lines, "", f"{passed} of {len(rows)} as expected"])
