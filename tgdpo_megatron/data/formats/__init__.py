"""Preference data in the formats that people have: how a row becomes a prompt with a chosen and a rejected answer.

A format is a set of column names with the kind of value in each column (table.py). The first row decides which format a
source has, and every row is checked against that format. A row with values of the wrong kind is an error that names the
row. A row that is well formed but cannot be trained on (images, a tie) is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.config import FormatName
from tgdpo_megatron.data.formats.recognition import Ambiguous, format_of, recognise, renamed
from tgdpo_megatron.data.formats.table import FORMATS, SYSTEM, Format
from tgdpo_megatron.data.formats.tools import read_tools, strings_of
from tgdpo_megatron.data.formats.values import KINDS, Answer, Malformed, Row, Turn, Unusable, kind_of, read_optional
from tgdpo_megatron.data.read import NumberedRows, place, read_rows
from tgdpo_megatron.errors import UserError

__all__ = ["FORMATS", "TextPair", "TextPairs", "Turn", "read_pairs", "texts_of"]


@dataclass(frozen=True)
class TextPair:
    """One conversation up to the turn before the answers, with a chosen and a rejected answer.

    Attributes:
        messages: The turns before the answers. Only the first may be a system turn, and the last is from the user or
            from a tool.
        chosen, rejected: Text of the assistant's next turn.
        row: Number of the pair's line in a .jsonl file, else of its row, from 1.
        tools: What the model may call, as JSON schemas.
        beside: What the chosen and the rejected answer have beside their text: `reasoning_content`, `tool_calls`.
    """

    messages: tuple[Turn, ...]
    chosen: str
    rejected: str
    row: int
    tools: tuple[dict[str, Any], ...] = ()
    beside: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

    @property
    def answers(self) -> tuple[Turn, Turn]:
        """The chosen and the rejected answer as turns."""
        texts = (self.chosen, self.rejected)
        first, second = (
            {"role": "assistant", "content": text, **more} for text, more in zip(texts, self.beside, strict=True)
        )
        return first, second

    @property
    def texts(self) -> list[str]:
        """All texts of the pair: every turn and both answers, then what they have beside, and tools."""
        more = [{key: turn[key] for key in turn if key not in ("role", "content")} for turn in self.messages]
        said = [*(turn["content"] for turn in self.messages), self.chosen, self.rejected]
        return [*said, *strings_of([value for one in (*more, *self.beside) for value in one.values()])] + strings_of(
            self.tools
        )


@dataclass(frozen=True)
class TextPairs:
    """All pairs of a source, and how they were read.

    Attributes:
        format: Name of the format.
        columns: The columns that were read. `question as prompt` is a column that data.columns renamed.
        rows: Number of rows, those left out included.
        dropped: Reason -> numbers of the rows left out for it.
    """

    format: FormatName
    columns: tuple[str, ...]
    pairs: list[TextPair]
    rows: int
    dropped: dict[str, list[int]]


def read_pairs(path: Path, format: FormatName | None = None, columns: Mapping[str, str] | None = None) -> TextPairs:
    """Read all pairs of a file or of a saved `datasets` folder.

    Args:
        format: One of FORMATS; None to recognise it.
        columns: What data.columns renames: our name of a column -> the file's.

    Raises:
        UserError: A source that read_rows refuses, columns that fit no known format or not the given one, or rows
            that do not have the format. All such rows are named.
    """
    columns = columns or {}
    rows = renamed(path, read_rows(path), columns)
    name, form = format_of(path, rows, format)
    pairs, dropped = texts_of(path, rows, name, form)
    seen = [column for column in (*form.columns, *form.optional) if any(column in row for _, row in rows)]
    told = tuple(f"{columns[column]} as {column}" if column in columns else column for column in seen)
    return TextPairs(name, told, pairs, len(rows), dropped)


def texts_of(path: Path, rows: NumberedRows, name: str, form: Format) -> tuple[list[TextPair], dict[str, list[int]]]:
    """The rows that can be used, and reason -> numbers of the rows left out for it.

    Args:
        path: Where the rows are from.
        name: Of the format.

    Raises:
        UserError: Some rows do not have the format. All are named.
    """
    pairs: list[TextPair] = []
    dropped: dict[str, list[int]] = {}
    malformed: list[tuple[int, str]] = []
    for number, row in rows:
        try:
            pairs.append(_pair(form, number, row))
        except Unusable as reason:
            dropped.setdefault(str(reason), []).append(number)
        except Malformed as error:
            malformed.append((number, _other_format(row, name, form) or f"{error}; the data is read as {name}"))
    if malformed:
        raise UserError(_all_malformed(path, malformed))
    return pairs, dropped


def _pair(form: Format, number: int, row: Any) -> TextPair:
    """Check one row and read it."""
    if not isinstance(row, dict):
        raise Malformed(f"expected an object with named columns, found {type(row).__name__}")
    missing = [column for column in form.columns if row.get(column) is None]
    if missing:
        raise Malformed(f"{' and '.join(missing)} missing; the row has {', '.join(map(str, row)) or 'no columns'}")
    for column, kind in form.columns.items():
        if not KINDS[kind](row[column]):
            raise Malformed(f"'{column}' must hold {kind}, found {kind_of(row[column])}")
    if any(row.get(column) for column in ("images", "videos", "audios")):
        raise Unusable("images, videos or sound belong to the row")
    tools = read_tools(form.tools(row))
    turns, *answers = form.read(row)
    (chosen, *_), (rejected, *_) = both = [_parts(answer) for answer in answers]
    messages = (*_system(form, row, turns), *turns)
    return _checked(TextPair(messages, chosen, rejected, number, tools, (both[0][1], both[1][1])))


def _parts(answer: Answer) -> tuple[str, dict[str, Any]]:
    """The text of an answer, and what it has beside."""
    if isinstance(answer, str):
        return answer, {}
    return answer["content"], {key: value for key, value in answer.items() if key not in ("role", "content")}


def _system(form: Format, row: Row, turns: list[Turn]) -> list[Turn]:
    """The column with the system text as a turn, unless the conversation begins with a system turn."""
    text = next((text for column in SYSTEM if column in form.optional and (text := read_optional(row, column))), "")
    return [{"role": "system", "content": text}] if text and [turn["role"] for turn in turns[:1]] != ["system"] else []


def _checked(pair: TextPair) -> TextPair:
    roles = [turn["role"] for turn in pair.messages]
    if roles[-1:] not in (["user"], ["tool"]):
        raise Unusable("the turn before the answers is not the user's")
    if "user" not in roles:
        raise Unusable("the user says nothing")
    if "system" in roles[1:]:
        raise Unusable("a system turn is not the first")
    try:
        "".join(pair.texts).encode()
    except UnicodeEncodeError:  # such as JSON's \ud83d without its second half
        raise Unusable("the text holds an incomplete character") from None
    return pair


def _other_format(row: Any, name: str, form: Format) -> str | None:
    """What is wrong with a row that was written in another known format; None for one that is only malformed."""
    try:
        found = recognise(row) if isinstance(row, dict) else None
    except Ambiguous:
        found = None
    if found is None or found[0] == name:
        return None
    theirs, ours = found[1].columns.keys(), form.columns
    others = theirs - ours.keys() and any(row.get(column) is None for column in ours)
    kinds = not any(column in ours and KINDS[ours[column]](row[column]) for column in theirs)
    if not (others or kinds):
        return None
    return f"the row is of the format {found[0]}, the first row of {name}; keep each format in a file of its own"


def _all_malformed(path: Path, malformed: list[tuple[int, str]], most: int = 20) -> str:
    """One sentence: what is wrong with the first row, and the numbers of the others."""
    (number, what), *others = malformed
    if not others:
        return f"{place(path, number)}: {what}."
    numbers = ", ".join(str(other) for other, _ in others[:most]) + (", …" if len(others) > most else "")
    return f"{place(path, number)}: {what}; {len(others)} more malformed: {numbers}."
