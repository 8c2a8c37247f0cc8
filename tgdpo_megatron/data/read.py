"""Read rows from files: JSON, JSON lines, CSV, Parquet, a folder saved by the `datasets` library, a split on a hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.data import hub_splits
from tgdpo_megatron.errors import UserError, in_short, ran_out_of_memory

NumberedRows = list[tuple[int, Any]]
"""Rows, each with its number from 1: that of its line in a .jsonl file, else that of the row."""
COMPRESSED = (".gz", ".zst")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
"""Files of text, compressed or not."""
KNOWN = "a .json, .jsonl, .csv or .tsv file, perhaps compressed as .gz or .zst, a .parquet file"


def read_rows(path: Path) -> NumberedRows:
    """Read all rows of a file (SUFFIXES, perhaps compressed, or .parquet), a saved `datasets` folder or a hub's split.

    Raises:
        UserError: The source is missing, empty or unreadable, or has no rows. Where a line is at fault, it is named.
    """
    files = source_files(path)
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty.")
    if not path.exists():  # a split on a hub, whose files are read one after another
        rows_of_files = (row for file in files for _, row in read_rows(file))
        return list(enumerate(rows_of_files, start=1))
    kind = _kind(path)
    if path.is_dir() or kind == ".parquet":
        rows = _read_arrow(path)
    elif kind in (".json", ".jsonl"):
        rows = _read_json(path, kind)
    elif kind in (".csv", ".tsv"):
        rows = _read_table(path, kind)
    else:
        raise UserError(f"{path}: pairs are read from {KNOWN} or a saved datasets folder, not from '{path.suffix}'.")
    if not rows:
        raise UserError(f"{path}: the file holds no pairs.")
    return rows


def place(path: Path, number: int) -> str:
    """The name of a row in error messages."""
    return f"{path} {'line' if _kind(path) == '.jsonl' else 'row'} {number}"


def _kind(path: Path) -> str:
    """The suffix of a file, that of its compression left out."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def source_files(path: Path) -> list[Path]:
    """The files that hold the rows of a source, in order: one file, or those of a saved `datasets` folder or a split.

    Other files in the folder, such as the library's caches, are left out. A split on a hub is downloaded if need be.

    Raises:
        UserError: There is no such source, the folder holds several splits, or it is another kind of folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        return _split_of(path).files
    if (path / "dataset_dict.json").is_file():
        splits = _description(path / "dataset_dict.json", lambda described: [str(name) for name in described["splits"]])
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; give one of them, such as {path / splits[0]}.")
    if not (path / "state.json").is_file():
        raise UserError(
            f"{path}: neither a folder of prepared pairs (summary.json, pairs.safetensors) nor a saved datasets "
            f"folder (state.json); give one of these, or {KNOWN}."
        )
    names = _description(path / "state.json", lambda described: [file["filename"] for file in described["_data_files"]])
    files = [path / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: this part of the saved dataset is missing.")
    return files


def commit_of(path: Path) -> str:
    """The commit of the data set on a hub that a source is a split of; empty for a local source."""
    return "" if path.exists() else _split_of(path).commit


def _split_of(path: Path) -> hub_splits.Found:
    wanted = hub_splits.hub_split(path)
    if wanted is None:
        raise UserError(f"{path}: no such data file, and no data set on a hub, which is {hub_splits.FORM}.")
    return hub_splits.find_split(wanted)


def _description(file: Path, names: Callable[[Any], list[str]]) -> list[str]:
    """The names that a JSON file of a saved dataset lists; there is at least one."""
    content = read_json(file, what="description of a saved dataset")
    try:
        found = names(content)
    except (KeyError, TypeError):
        found = []
    if not found:
        raise UserError(f"{file}: this description of a saved dataset is damaged.")
    return found


def _read_arrow(path: Path) -> NumberedRows:
    """Rows of a .parquet file or a saved `datasets` folder.

    The `datasets` library, which takes seconds to load, is asked only where it stores JSON in columns of text.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        if path.is_dir():
            tables = []
            for part in source_files(path):
                with pyarrow.memory_map(str(part)) as stream:
                    tables.append(pyarrow.ipc.open_stream(stream).read_all())
            table = pyarrow.concat_tables(tables)
        else:
            with parquet.ParquetFile(path) as file:
                table = file.read()
        described = (table.schema.metadata or {}).get(b"huggingface", b"")
        rows = _through_datasets(path) if b'"Json"' in described else table.to_pylist()
    except Exception as error:  # only the libraries' code is in here: what they cannot read is the file's fault
        if ran_out_of_memory(error):
            raise
        raise UserError(f"{path}: cannot be read ({in_short(error)}).") from error
    return list(enumerate(rows, start=1))


def _through_datasets(path: Path) -> list[Any]:
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from datasets import Dataset

    if path.is_dir():
        rows: list[Any] = Dataset.load_from_disk(str(path)).to_list()
        return rows
    with tempfile.TemporaryDirectory() as cache:
        rows = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()
    return rows


def _read_text(path: Path) -> str:
    """The text of a file, uncompressed."""
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(path.read_bytes())
        elif path.suffix == ".zst":
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                data = stream.read()
        else:
            data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
        if path.suffix not in COMPRESSED or getattr(error, "errno", None):
            raise
        raise UserError(f"{path}: cannot be uncompressed ({in_short(error)}).") from None


def _read_json(path: Path, kind: str) -> NumberedRows:
    """Read JSON without `datasets`, which guesses column types: answers that are all dates would not stay strings."""
    text = _read_text(path)
    if kind == ".jsonl":
        return _read_lines(path, text)
    if text.lstrip()[:1] == "{" and _is_object(text.lstrip().split("\n", 1)):
        return list(enumerate((row for _, row in _read_lines(path, text)), start=1))
    rows = _parse(path, text, first_line=1)
    if isinstance(rows, dict) and rows.keys() == {"type", "instances"}:  # LMFlow's files
        rows = rows["instances"]
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of pairs, found {type(rows).__name__}.")
    return list(enumerate(rows, start=1))


def _is_object(lines: Sequence[str]) -> bool:
    """Whether the first of several lines is an object of its own, as in JSON lines."""
    try:
        return len(lines) > 1 and isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def _read_lines(path: Path, text: str) -> NumberedRows:
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _parse(path, line, number)) for number, line in lines if line.strip()]


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {first_line + error.lineno - 1}: not valid JSON ({error.msg}).") from None
    except RecursionError:
        raise UserError(f"{path} line {first_line}: lists or objects are nested too deeply.") from None
    except ValueError:
        raise UserError(f"{path} line {first_line}: holds an integer of thousands of digits.") from None


def _read_table(path: Path, kind: str) -> NumberedRows:
    """Rows of a table whose first line names the columns. Every cell is text."""
    csv.field_size_limit(sys.maxsize)  # a cell may hold a whole conversation
    reader = csv.reader(
        io.StringIO(_read_text(path), newline=""), delimiter="\t" if kind == ".tsv" else ",", strict=True
    )
    rows: NumberedRows = []
    names: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = cells
                if len(names) == 1 and ";" in names[0]:
                    raise UserError(f"{path}: its cells seem to be separated by ';'; separate them by commas.")
                continue
            number = len(rows) + 1
            if len(cells) != len(names):
                raise UserError(
                    f"{place(path, number)}: {len(cells)} cells, where the first line names {len(names)} columns."
                )
            if turns := next((name for name, cell in zip(names, cells, strict=True) if cell.startswith("[{")), None):
                raise UserError(
                    f"{place(path, number)}: '{turns}' holds turns written as text, which a table cannot "
                    "hold; save the data as .jsonl or .parquet."
                )
            rows.append((number, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not valid {kind[1:].upper()} ({error}).") from None
    if len(set(names)) < len(names):
        raise UserError(f"{path}: the first line names a column twice.")
    return rows
