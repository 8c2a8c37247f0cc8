"""What others wrote is read within bounds: each thing that would crash, hang or fill the memory is one sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tgdpo_megatron.bounded import DEPTH, VALUES, parse_json, parse_yaml, read_json, read_text, read_yaml
from tgdpo_megatron.errors import UserError

BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


def refused(work: Callable[[], Any]) -> str:
    """The sentence of a refusal, which must come soon."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        work()
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "W: has more than 100,000 values, with its aliases written out; this is too many."),
        (MERGED, "W: has more than 100,000 values"),
        ("&a [*a]", "W: lists or mappings are nested more than 100 deep."),
        ("[" * 20_000 + "]" * 20_000, "W: lists or mappings are nested more than 100 deep."),
        ("{a: " * 150 + "}" * 150, "W: lists or mappings are nested more than 100 deep."),
        ("a: " + "9" * 5000, "W: holds an integer of 5,000 digits; at most 100 are read."),
        ("a: 1\nb: 2\na: 3", "W line 3: 'a' is there twice; keep one of them."),
    ],
)
def test_yaml_out_of_bounds_is_refused(text: str, words: str) -> None:
    assert refused(lambda: parse_yaml(text, where="W")).startswith(words)


@pytest.mark.parametrize(
    "text", ["a: [", "!!python/object/apply:os.system [id]", "!!int x", "!!timestamp 2026-13-45", "\0"]
)
def test_what_is_not_plain_yaml_is_a_yaml_error(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text, where="W")


@pytest.mark.parametrize("date", ["2026-11-30", "2026-13-45", "2026-11-31 25:61:00"])
def test_a_date_in_yaml_is_text(date: str) -> None:
    assert parse_yaml(f"a: {date}", where="W") == {"a": date}


def test_yaml_within_bounds_is_what_the_safe_loader_reads() -> None:
    text = "a: &x {b: [1, 2.5, 1e-3, true, null, 'é']}\nc: {<<: *x, d: *x}\ne: " + str(10**30)
    assert parse_yaml(text, where="W") == yaml.safe_load(text)
    assert parse_yaml("", where="W") is None
    many = "[" + "1," * (VALUES - 2) + "1]"
    assert len(parse_yaml(many, where="W")) == VALUES - 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "W: lists or mappings are nested more than 100 deep."),
        ('{"a":' * DEPTH + "[]" + "}" * DEPTH, "W: lists or mappings are nested more than 100 deep."),
        ("9" * 5000, "W: holds an integer of 5,000 digits; at most 100 are read."),
        ("-" + "9" * 101, "W: holds an integer of 101 digits; at most 100 are read."),
        ('{"a":\n', "W line 2: not valid JSON (Expecting value)."),
        ("", "W line 1: not valid JSON (Expecting value)."),
    ],
)
def test_json_out_of_bounds_is_refused(text: str, words: str) -> None:
    assert refused(lambda: parse_json(text, where="W")) == words


def test_json_within_bounds_is_read_as_it_is() -> None:
    deep = "[" * DEPTH + "]" * DEPTH
    assert parse_json(deep, where="W") == json.loads(deep)
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}', where="W") == {
        "model_max_length": 1000000000000000019884624838656
    }


def test_a_file_is_read_as_utf8_whatever_the_locale_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + '"Größe — 大小"\r\n'.encode())
    assert read_text(tmp_path / "a", what="file") == '"Größe — 大小"\n'
    assert read_json(tmp_path / "a", what="file") == "Größe — 大小" == read_yaml(tmp_path / "a", what="file")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Gr\xf6\xdfe".encode("latin-1"))
    (tmp_path / "large").write_bytes(b"1" * 1001)
    (tmp_path / "exact").write_bytes(b"1" * 1000)
    assert refused(lambda: read_text(tmp_path / "no", what="list")) == f"{tmp_path / 'no'}: no such list."
    assert refused(lambda: read_text(tmp_path, what="list")) == f"{tmp_path}: is a folder, not a list."
    assert refused(lambda: read_text(tmp_path / "latin", what="list")).endswith("latin: byte 2 is not UTF-8 text.")
    large = refused(lambda: read_text(tmp_path / "large", what="list", limit=1000))
    assert large.endswith("large: has more than 1,000 bytes, which is too much for a list.")
    assert len(read_text(tmp_path / "exact", what="list", limit=1000)) == 1000
    assert refused(lambda: read_text(Path("/dev/zero"), what="list")) == "/dev/zero: no such list."
