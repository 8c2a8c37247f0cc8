"""Tables that programs write into pages: each stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tgdpo_megatron.errors import UserError


def with_tables(page: Path, tables: Mapping[str, str]) -> str:
    """A page with its tables filled in.

    Args:
        tables: Name of a table -> its text.

    Raises:
        UserError: The page lacks the lines around a table.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise UserError(f"{page}: the lines '{begin.strip()}' and '{end}' are missing; put them around the table.")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{table}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first columns, so many, are words. Numbers stand at the right."""
    right = "|".join([*["---"] * words, *["--:"] * (len(columns) - words)])
    return "\n".join([f"| {' | '.join(columns)} |", f"|{right}|", *(f"| {' | '.join(line)} |" for line in lines)])


def write(contents: Mapping[Path, str]) -> None:
    """Write some files, whose folders are made where they are missing."""
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
