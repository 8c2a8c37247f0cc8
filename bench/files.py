"""Files of rows: each is a program of its own, so that no measurement touches the next one's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.machine import machine
from bench.rows import Row, table
from tgdpo_megatron.quiet import quiet


def run_file(name: str, *, seconds: float | None = None, **environment: str) -> list[Row]:
    """The rows of one file; a file that breaks is a failed row after those it had, and the others still run.

    Every row carries the last part of the name of its file.

    Args:
        name: Of its module.
        seconds: A file that takes longer is stopped, and counts as broken.
        environment: Variables to set for it.
    """
    file = name.rpartition(".")[2]
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "rows.json", Path(folder) / "stderr"
        command = [sys.executable, "-m", name, "--rows", str(output)]
        common = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w", encoding="utf-8") as said:
            try:
                subprocess.run(
                    command,
                    env={**os.environ, **common, **environment},
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    timeout=seconds,
                    check=True,
                )
            except subprocess.TimeoutExpired:
                reason = f"stopped after {seconds:.0f} s"
            except subprocess.CalledProcessError:
                reason = "broke: " + (log.read_text(encoding="utf-8").strip().splitlines() or ["no message"])[-1]
            else:
                return [replace(row, file=file) for row in read_rows(output)]
        print(log.read_text(encoding="utf-8")[-4000:], file=sys.stderr)
        kept = read_rows(output) if output.is_file() else []
        return [replace(row, file=file) for row in (*kept, Row(name, None, broke=True, note=reason))]


def write_results(rows: list[Row], path: Path) -> None:
    """All rows, with the machine they are from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "rows": [row.as_dict() for row in rows]}
    write_whole(path, json.dumps(results, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written: whoever writes it may be stopped at any time."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """For the program that started this one."""
    write_whole(path, json.dumps([asdict(row) for row in rows]))


def read_rows(path: Path) -> list[Row]:
    """What write_rows wrote."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def program(description: str | None, measure: Callable[[], Iterable[Row]]) -> None:
    """The command line that every file of rows has: print the table, or write the rows for the program above.

    Rows are written as they come, so that a file that breaks, or runs out of time, keeps those it has.
    """
    import argparse

    quiet()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    rows: list[Row] = []
    for row in measure():
        rows.append(row)
        if parsed.rows:
            write_rows(rows, parsed.rows)
    if not parsed.rows:
        print(table(rows))
