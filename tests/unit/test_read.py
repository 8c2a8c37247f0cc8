"""Reading pairs: three formats, one result; every malformed row is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tgdpo_megatron.data.read import TextPair, read_pairs
from tgdpo_megatron.errors import UserError

ROWS = [
    {"instruction": "Say hello.", "chosen": "Hello!", "rejected": "No."},
    {"instruction": "Zwei + zwei? ✓", "chosen": "Vier.\nJa.", "rejected": ""},
]
EXPECTED = [
    TextPair("Say hello.", "Hello!", "No.", row=1),
    TextPair("Zwei + zwei? ✓", "Vier.\nJa.", "", row=2),
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


WRITERS = {".json": write_json, ".jsonl": write_jsonl, ".parquet": write_parquet}


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_pairs(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_pairs(suffix: str, tmp_path: Path) -> None:
    assert read_pairs(WRITERS[suffix](tmp_path / f"pairs{suffix}", ROWS)) == EXPECTED


@pytest.mark.parametrize("suffix", WRITERS)
def test_prompt_is_another_name_for_instruction(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": row["instruction"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS]
    assert read_pairs(WRITERS[suffix](tmp_path / f"pairs{suffix}", rows)) == EXPECTED


def test_other_columns_are_ignored(tmp_path: Path) -> None:
    rows = [{"id": number, "score": {"a": [1, 2]}, **row} for number, row in enumerate(ROWS)]
    assert read_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows)) == EXPECTED


def test_blank_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert [pair.chosen for pair in read_pairs(path)] == ["Hello!", "Vier.\nJa."]


def test_reading_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    read_pairs(write_jsonl(tmp_path / "pairs.jsonl", ROWS))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'}: no such data file."


def test_a_hub_name_is_not_looked_up() -> None:
    assert refusal(Path("mk1111/llama3-8b-instruct-ultrafeedback")).endswith(": no such data file.")


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
    path = tmp_path / "pairs.csv"
    path.write_text("instruction,chosen,rejected\n1,2,3\n")
    assert ".json, .jsonl or .parquet" in refusal(path)


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


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("column", ["instruction", "chosen", "rejected"])
def test_a_missing_column_is_named(suffix: str, column: str, tmp_path: Path) -> None:
    rows = [{name: text for name, text in row.items() if name != column} for row in ROWS]
    sentence = refusal(WRITERS[suffix](tmp_path / f"pairs{suffix}", rows))
    named = "prompt (or instruction)" if column == "instruction" else column
    assert f"{'line' if suffix == '.jsonl' else 'row'} 1: {named} missing; the row has" in sentence


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_row_without_an_answer_is_named(suffix: str, tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0] | {"chosen": None}]
    where = "line 3" if suffix == ".jsonl" else "row 3"
    assert f"{where}: chosen missing" in refusal(WRITERS[suffix](tmp_path / f"pairs{suffix}", rows))


@pytest.mark.parametrize(
    ("value", "kind"), [(7, "int"), ({"from": "gpt", "value": "Hello"}, "dict"), (["Hello"], "list")]
)
def test_an_answer_that_is_no_text_is_named_with_its_type(value: Any, kind: str, tmp_path: Path) -> None:
    rows = [ROWS[0] | {"chosen": value}]
    assert f"line 1: 'chosen' must be a string, found {kind}" in refusal(write_jsonl(tmp_path / "pairs.jsonl", rows))


def test_one_answer_of_another_type_among_many_is_named(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1], ROWS[0] | {"rejected": 12}]
    sentence = refusal(write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert "line 3: 'rejected' must be a string, found int" in sentence


def test_rows_that_are_no_objects_are_named(tmp_path: Path) -> None:
    sentence = refusal(write_json(tmp_path / "pairs.json", ["a", "b"]))
    assert "row 1: " in sentence and "chosen" in sentence


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(path).startswith(f"{path}: cannot be read (")


def test_the_shared_instruction_data_reads(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("preferences_instruction.json")
    rows = json.loads(path.read_text())
    pairs = read_pairs(path)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (row["instruction"], row["chosen"], row["rejected"]) for row in rows
    ]


def test_answers_that_look_like_dates_stay_text(tmp_path: Path) -> None:
    rows = [{"prompt": "When?", "chosen": "2024-01-02", "rejected": "2024-01-03"}] * 2
    assert read_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))[1].chosen == "2024-01-02"
