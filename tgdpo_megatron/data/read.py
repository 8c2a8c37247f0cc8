"""Read rows from files: JSON, JSON lines, Parquet, or a folder saved by the `datasets` library."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError, in_short, ran_out_of_memory

NumberedRows = list[tuple[int, Any]]
"""Rows, each with its number from 1: that of its line in a .jsonl file, else that of the row."""


def read_rows(path: Path) -> NumberedRows:
    """Read all rows of a .json (a list), .jsonl or .parquet file, or of a saved `datasets` folder.

    Raises:
        UserError: The source is missing, empty or unreadable, or has no rows. Where a line is at fault, it is named.
    """
    for file in source_files(path):
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty.")
    if path.is_dir():
        rows = _through_datasets(path, lambda library, _: library.Dataset.load_from_disk(str(path)))
    elif path.suffix == ".parquet":
        rows = _through_datasets(path, lambda library, cache: _parquet(library, path, cache))
    elif path.suffix in (".json", ".jsonl"):
        rows = _read_json(path)
    else:
        raise UserError(
            f"{path}: pairs are read from .json, .jsonl or .parquet files or a saved datasets folder, "
            f"not from '{path.suffix}'."
        )
    if not rows:
        raise UserError(f"{path}: the file holds no pairs.")
    return rows


def place(path: Path, number: int) -> str:
    """The name of a row in error messages."""
    return f"{path} {'line' if path.suffix == '.jsonl' else 'row'} {number}"


def source_files(path: Path) -> list[Path]:
    """The files that hold the rows of a source, in order: one file, or the Arrow files of a saved `datasets` folder.

    Other files in the folder, such as the library's caches, are left out.

    Raises:
        UserError: There is no such source, the folder holds several splits, or it is another kind of folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such data file.")
    if (path / "dataset_dict.json").is_file():
        splits = _description(path / "dataset_dict.json", lambda described: [str(name) for name in described["splits"]])
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; give one of them, such as {path / splits[0]}.")
    if not (path / "state.json").is_file():
        raise UserError(
            f"{path}: neither a folder of prepared pairs (summary.json, pairs.safetensors) nor a saved datasets "
            "folder (state.json); give one of these, or a .json, .jsonl or .parquet file."
        )
    names = _description(path / "state.json", lambda described: [file["filename"] for file in described["_data_files"]])
    files = [path / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: this part of the saved dataset is missing.")
    return files


def _description(file: Path, names: Callable[[Any], list[str]]) -> list[str]:
    """The names that a JSON file of a saved dataset lists; there is at least one."""
    try:
        found = names(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    if not found:
        raise UserError(f"{file}: this description of a saved dataset is damaged.")
    return found


def _through_datasets(path: Path, load: Callable[[Any, str], Any]) -> NumberedRows:
    """Rows of the data set that `load` returns, called with the `datasets` library and a folder for its cache."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = load(datasets, cache).to_list()
        except Exception as error:  # only the libraries' code is in here: what they cannot read is the file's fault
            if ran_out_of_memory(error):
                raise
            raise UserError(f"{path}: cannot be read ({in_short(error)}).") from error
    return list(enumerate(rows, start=1))


def _parquet(library: Any, path: Path, cache: str) -> Any:
    return library.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)


def _read_json(path: Path) -> NumberedRows:
    """Read JSON without `datasets`, which guesses column types: answers that are all dates would not stay strings."""
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
    return list(enumerate(rows, start=1))


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {first_line + error.lineno - 1}: not valid JSON ({error.msg}).") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise UserError(f"{path} line {first_line}: the JSON cannot be read ({error}).") from None
