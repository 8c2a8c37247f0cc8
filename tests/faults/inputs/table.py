"""All bad inputs, as rows of the table of faults."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.inputs import SUBJECTS
from tests.faults.inputs.entry import BadInput
from tests.faults.inputs.forked import ForkedPrograms
from tests.faults.inputs.parts import make_parts
from tests.faults.inputs.run import Programs, run
from tests.faults.rows import Row

AT_ONCE = 3
"""Entries that need a Python of their own and run at once. The slow ones only wait."""


def bad_inputs(folder: Path, only: str) -> list[Row]:
    """A row for each entry whose name or subject contains `only`."""
    programs = ForkedPrograms()
    parts = folder / "parts"
    make_parts(parts, programs)

    def judged(subject: str, entry: BadInput) -> Row:
        if reason := entry.skip():
            return Row(subject, entry.name, passed=True, said=f"not tried: {reason}")
        outcome = run(entry, parts, programs if not entry.fresh else Programs())
        faults = outcome.faults(entry)
        wanted = f"; expected: {entry.says}" if "another sentence" in faults else ""
        note = f"{', '.join(faults)}{wanted}" if faults else ""
        return Row(subject, entry.name, passed=not faults, said=outcome.said, seconds=outcome.seconds, note=note)

    chosen = [
        (subject, entry)
        for subject, entries in SUBJECTS.items()
        for entry in entries
        if only in entry.name or only in subject
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        beside = {id(entry): pool.submit(judged, subject, entry) for subject, entry in chosen if entry.fresh}
        rows = [judged(subject, entry) for subject, entry in chosen if not entry.fresh]
        rows += [row.result() for row in beside.values()]
    programs.close()
    return sorted(rows, key=lambda row: list(SUBJECTS).index(row.subject))
