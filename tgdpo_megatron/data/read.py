"""Read preference pairs from a file and check every row before anything slow begins."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError

PROMPT_COLUMNS = ("prompt", "instruction")
RESPONSE_COLUMNS = ("chosen", "rejected")


@dataclass(frozen=True)
class TextPair:
    """One prompt with a chosen and a rejected response, and where it was read."""

    prompt: str
    chosen: str
    rejected: str
    row: int
    """1-based: the line of a .jsonl file, else the number of the row."""


def read_pairs(path: Path) -> list[TextPair]:
    """Read all pairs of a .json (a list), .jsonl or .parquet file.

    Raises:
        UserError: Missing, empty or unreadable file, a malformed row, missing columns; says which row.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such data file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty.")
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise UserError(f"{path}: pairs are read from .json, .jsonl or .parquet files, not '{path.suffix}'.")
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    pairs = [_text_pair(path, number, row) for number, row in rows]
    if not pairs:
        raise UserError(f"{path}: the file holds no pairs.")
    return pairs


def _read_parquet(path: Path) -> Iterable[tuple[int, Any]]:
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from datasets import Dataset, disable_progress_bars
    from datasets.utils.logging import CRITICAL, set_verbosity

    disable_progress_bars()
    set_verbosity(CRITICAL)
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()
        except Exception as error:
            raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}).") from None
    return enumerate(rows, start=1)


def _read_json(path: Path) -> Iterable[tuple[int, Any]]:
    """Rows and their numbers; for .jsonl the number is the line's.

    Not through `datasets`, which guesses column types: answers that are all dates would not stay strings.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text.") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        return [(number, _parse(path, line, number)) for number, line in lines if line.strip()]
    rows = _parse(path, text, first_line=1)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of pairs, found {type(rows).__name__}.")
    return enumerate(rows, start=1)


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {first_line + error.lineno - 1}: not valid JSON ({error.msg}).") from None


def _text_pair(path: Path, number: int, row: Any) -> TextPair:
    where = f"{path} {'line' if path.suffix == '.jsonl' else 'row'} {number}"
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with prompt, chosen and rejected, found {type(row).__name__}.")
    prompt_column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    missing = [name for name in RESPONSE_COLUMNS if row.get(name) is None]
    if prompt_column is None:
        missing.insert(0, "prompt (or instruction)")
    if missing or prompt_column is None:
        raise UserError(
            f"{where}: {' and '.join(missing)} missing; the row has {', '.join(map(str, row)) or 'no columns'}."
        )
    for name in (prompt_column, *RESPONSE_COLUMNS):
        if not isinstance(row[name], str):
            raise UserError(f"{where}: '{name}' must be a string, found {type(row[name]).__name__}.")
    return TextPair(row[prompt_column], row["chosen"], row["rejected"], number)
