"""Bytes to rows: four formats, one result; every unreadable source is named."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tgdpo_megatron.data.read import place, read_rows, source_files
from tgdpo_megatron.errors import UserError

ROWS = [
    {"instruction": "Say hello.", "chosen": "Hello!", "rejected": "No."},
    {"instruction": "Zwei + zwei? ✓", "chosen": "Vier.\nJa.", "rejected": ""},
]


def write_json(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    return path


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Sequence[Any]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def save_dataset(path: Path, rows: Sequence[Any]) -> Path:
    from datasets import Dataset

    Dataset.from_list(list(rows)).save_to_disk(str(path))
    return path


WRITERS = {".json": write_json, ".jsonl": write_jsonl, ".parquet": write_parquet}


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_rows(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("suffix", [*WRITERS, "saved"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    write = WRITERS.get(suffix, save_dataset)
    assert read_rows(write(tmp_path / f"pairs{suffix}", ROWS)) == [(1, ROWS[0]), (2, ROWS[1])]


NESTED = [
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"}, "scores": [1]},
    {"conversations": [], "chosen": {"from": "gpt", "value": "2024-01-02"}, "scores": []},
]


@pytest.mark.parametrize("suffix", [*WRITERS, "saved"])
def test_lists_and_objects_stay_what_they_are(suffix: str, tmp_path: Path) -> None:
    write = WRITERS.get(suffix, save_dataset)
    assert [row for _, row in read_rows(write(tmp_path / f"pairs{suffix}", NESTED))] == NESTED


def test_blank_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert read_rows(path) == [(1, ROWS[0]), (3, ROWS[1])], "numbers are those of the lines"


def test_reading_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    read_rows(write_jsonl(tmp_path / "pairs.jsonl", ROWS))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.jsonl").startswith(f"{tmp_path / 'no.jsonl'}: no such data file, and no data set on")


def test_the_path_of_a_file_is_not_looked_up_on_a_hub() -> None:
    """Though it has the form of a name there."""
    assert refusal(Path("data/pairs.jsonl")).startswith("data/pairs.jsonl: no such data file, and no data set on a hub")


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_empty_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs{suffix}"
    path.touch()
    assert refusal(path) == f"{path}: the file is empty."


@pytest.mark.parametrize("content", ["[]", "[\n]\n"])
def test_an_empty_list_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content)
    assert refusal(path) == f"{path}: the file holds no pairs."


def test_blank_lines_alone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n\n")
    assert refusal(path) == f"{path}: the file holds no pairs."


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.xlsx"
    path.write_text("instruction,chosen,rejected\n1,2,3\n")
    assert ".json, .jsonl, .csv or .tsv" in refusal(path) and refusal(path).endswith("not from '.xlsx'.")


# ---------------------------------------------------------------- compressed files


def compress(path: Path) -> Path:
    """Write ROWS as compressed JSON lines."""
    import pyarrow

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with pyarrow.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]) as stream:
        stream.write(lines)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    assert read_rows(compress(tmp_path / f"pairs.jsonl{suffix}")) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"not compressed" + data])
def test_a_damaged_compressed_file_is_refused(suffix: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = compress(tmp_path / f"pairs.jsonl{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(path).startswith(f"{path}: cannot be uncompressed (")


def test_a_malformed_line_of_a_compressed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\nbad\n"))
    assert refusal(path).startswith(f"{path} line 2: not valid JSON (")
    assert place(path, 2) == f"{path} line 2"


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_gives_its_cells_as_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs{suffix}"
    long = "word " * 40_000  # longer than Python's csv module reads without being told
    rows = [{"prompt": 'Say "hi",\tplease\nand twice', "chosen": long, "rejected": "one\u2028two"}]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
        table.writeheader()
        table.writerows(rows)
    assert read_rows(path) == [(1, rows[0])]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,chosen,rejected\na,b,c\na,b\n", " row 2: 2 cells, where the first line names 3 columns."),
        ("prompt,chosen,rejected\na,b,c,d\n", " row 1: 4 cells, where the first line names 3 columns."),
        ('prompt,chosen,rejected\na,b,"c" d\n', " line 2: not valid CSV ("),
        ("prompt,chosen,chosen\na,b,c\n", ": the first line names a column twice."),
        ("prompt,chosen,rejected\n", ": the file holds no pairs."),
    ],
)
def test_a_malformed_table_names_the_row(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    assert refusal(path).startswith(f"{path}{words}")


# ---------------------------------------------------------------- JSON


def test_lines_in_a_json_file_are_read_as_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.json", ROWS)
    assert read_rows(path) == [(1, ROWS[0]), (2, ROWS[1])]
    path.write_text(path.read_text() + "broken\n")
    assert refusal(path).startswith(f"{path} line 3: not valid JSON (")


def test_columns_that_datasets_stores_as_json_are_read_as_it_reads_them(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Json, Value

    rows = [{"prompt": "a", "extra": {"b": 0}}, {"prompt": "c", "extra": {"d": "e"}}]
    saved = Dataset.from_list(rows, features=Features({"prompt": Value("string"), "extra": Json()}))
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "pairs.parquet"))
    for path in (tmp_path / "saved", tmp_path / "pairs.parquet"):
        assert [row for _, row in read_rows(path)] == saved.to_list() == rows


@pytest.mark.parametrize("bad", ['{"instruction": "a", "chosen": ', "not json", '{"instruction": "a" "b"}'])
def test_a_malformed_line_is_named(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text(f"{good}\n\n{good}\n{bad}\n{good}\n")
    assert refusal(path).startswith(f"{path} line 4: not valid JSON (")


def test_a_line_separator_inside_a_string_is_not_a_line_end(tmp_path: Path) -> None:
    """U+2028 may stand raw in a JSON string; text from the web has it."""
    path = tmp_path / "pairs.jsonl"
    odd = json.dumps(ROWS[0] | {"chosen": "one\u2028two"}, ensure_ascii=False)
    path.write_text(f"{odd}\n{odd}\nbroken\n", encoding="utf-8")
    assert refusal(path).startswith(f"{path} line 3: not valid JSON (")


def test_a_malformed_list_names_the_line(tmp_path: Path) -> None:
    path = write_json(tmp_path / "pairs.json", ROWS)
    lines = path.read_text().splitlines()
    lines[7] = lines[7].rstrip(",") + " oops"
    path.write_text("\n".join(lines))
    assert refusal(path).startswith(f"{path} line 8: not valid JSON (")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + b'{"instruction": "\xff\xfe", "chosen": "a"}\n')
    assert "not UTF-8 text" in refusal(path)


def test_a_json_object_is_not_a_list_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"data": ROWS}))
    assert refusal(path).startswith(str(path))


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(path).startswith(f"{path}: cannot be read (")


@pytest.mark.parametrize("bad", ["[" * 100_000, '{"rank": ' + "1" * 5000 + "}"], ids=["depth", "digits"])
def test_json_beyond_what_python_reads_is_refused(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + bad + "\n")
    assert refusal(path).startswith(f"{path} line 2: ")


def test_answers_that_look_like_dates_stay_text(tmp_path: Path) -> None:
    rows = [{"prompt": "When?", "chosen": "2024-01-02", "rejected": "2024-01-03"}] * 2
    assert read_rows(write_jsonl(tmp_path / "pairs.jsonl", rows))[1] == (2, rows[1])


# ---------------------------------------------------------------- saved folders


def test_several_splits_are_refused_and_named(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    part = Dataset.from_list(ROWS)
    DatasetDict({"train_prefs": part, "test_prefs": part}).save_to_disk(str(tmp_path / "saved"))
    sentence = refusal(tmp_path / "saved")
    assert "holds the splits train_prefs, test_prefs; give one of them" in sentence
    assert sentence.endswith(f"such as {tmp_path / 'saved' / 'train_prefs'}.")
    assert [row for _, row in read_rows(tmp_path / "saved" / "train_prefs")] == ROWS


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "neither a folder of prepared pairs" in refusal(tmp_path)


def test_a_saved_folder_without_its_data_is_refused(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "saved", ROWS)
    (arrow,) = folder.glob("*.arrow")
    arrow.unlink()
    assert refusal(folder) == f"{arrow}: this part of the saved dataset is missing."


def test_a_truncated_saved_folder_is_refused(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "saved", ROWS)
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:300])
    assert refusal(folder).startswith(f"{folder}: cannot be read (")


@pytest.mark.parametrize("content", ["{}", "7", '{"_data_files": [7]}', "[]"])
def test_a_damaged_description_of_a_saved_folder_is_refused(content: str, tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "saved", ROWS)
    (folder / "state.json").write_text(content)
    assert refusal(folder) == f"{folder / 'state.json'}: this description of a saved dataset is damaged."


def test_caches_beside_a_saved_folder_are_no_part_of_it(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "saved", ROWS)
    before = source_files(folder)
    (folder / "cache-0123456789abcdef.arrow").write_bytes(b"leftover")
    assert source_files(folder) == before and len(before) == 1


def test_reading_loads_neither_torch_nor_the_datasets_library(tmp_path: Path) -> None:
    """They take seconds, in which nobody is told that a file is missing or malformed."""
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    sources = [write_parquet(tmp_path / "pairs.parquet", pairs), save_dataset(tmp_path / "saved", pairs)]
    program = """
import sys
from pathlib import Path
from tgdpo_megatron.data.formats import read_pairs
for source in sys.argv[1:]:
    assert read_pairs(Path(source)).format == "trl"
assert not {"torch", "datasets", "pandas"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, *map(str, sources)], check=True)


def test_a_table_whose_cells_are_not_separated_by_commas_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt;chosen;rejected\nHi;Yes, please;No\n")
    with pytest.raises(UserError, match="its cells seem to be separated by ';'; separate them by commas"):
        read_rows(path)
