"""The formats of preference data: how a row becomes a prompt with a chosen and a rejected answer.

A format is a set of column names with the kind of value in each column (FORMATS). The first row decides which format a
source has, and every row is checked against that format. A row with values of the wrong kind is an error that names the
row. A row that is well formed but cannot be trained on (tool calls, images, a tie) is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tgdpo_megatron.config import FormatName
from tgdpo_megatron.data.read import NumberedRows, place, read_rows
from tgdpo_megatron.errors import UserError

Turn = dict[str, str]
"""`role` (system, user or assistant) and `content`, as chat templates take them."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TextPair:
    """One conversation up to the user's last turn, with a chosen and a rejected answer.

    Attributes:
        messages: The turns before the answers. Only the first may be a system turn, and the last is from the user.
        chosen, rejected: Text of the assistant's next turn.
        row: Number of the pair's line in a .jsonl file, else of its row, from 1.
    """

    messages: tuple[Turn, ...]
    chosen: str
    rejected: str
    row: int

    @property
    def texts(self) -> list[str]:
        """All texts of the pair: every turn and both answers."""
        return [*(turn["content"] for turn in self.messages), self.chosen, self.rejected]


@dataclass(frozen=True)
class TextPairs:
    """All pairs of a source, and how they were read.

    Attributes:
        format: Name of the format.
        columns: The columns that were read.
        rows: Number of rows, those left out included.
        dropped: Reason -> numbers of the rows left out for it.
    """

    format: FormatName
    columns: tuple[str, ...]
    pairs: list[TextPair]
    rows: int
    dropped: dict[str, list[int]]


class _Unusable(Exception):
    """The row is well formed but cannot be trained on. It is left out, and the reason is counted."""


class _Malformed(Exception):
    """The row does not have the format. It is refused, with its name before the message."""


def read_pairs(path: Path, format: FormatName | None = None) -> TextPairs:
    """Read all pairs of a file or of a saved `datasets` folder.

    Args:
        format: One of FORMATS; None to recognise it.

    Raises:
        UserError: A source that read_rows refuses, columns that fit no known format or not the given one, or a row
            that does not have the format.
    """
    rows = read_rows(path)
    name = recognise(path, rows, format)
    pairs: list[TextPair] = []
    dropped: dict[str, list[int]] = {}
    for number, row in rows:
        try:
            pairs.append(_pair(FORMATS[name], number, row))
        except _Unusable as reason:
            dropped.setdefault(str(reason), []).append(number)
        except _Malformed as error:
            raise UserError(f"{place(path, number)}: {error}; the data is read as {name}.") from None
    columns = (*FORMATS[name].columns, *FORMATS[name].optional)
    seen = tuple(column for column in columns if any(column in row for _, row in rows))
    return TextPairs(name, seen, pairs, len(rows), dropped)


def recognise(path: Path, rows: NumberedRows, format: FormatName | None) -> FormatName:
    """The format of the first row, or the given format if the first row has it.

    Raises:
        UserError: The row does not fit. The sentence lists the columns seen and the formats that would do.
    """
    number, row = rows[0]
    if not isinstance(row, dict):
        raise UserError(f"{place(path, number)}: expected an object with named columns, found {type(row).__name__}.")
    seen = ", ".join(f"{column} ({_kind_of(value)})" for column, value in row.items()) or "no columns"
    if format is not None:
        if not FORMATS[format].fits(row):
            raise UserError(f"{path}: data.format={format} needs {FORMATS[format]}; the first row has {seen}.")
        return format
    for name, candidate in FORMATS.items():
        if candidate.fits(row) and not (candidate.alone and candidate.has_others(row)):
            return name
    known = "; ".join(f"{name}: {candidate}" for name, candidate in FORMATS.items())
    raise UserError(
        f"{path}: not a known format of preference pairs; the first row has {seen}; rename its columns to one of "
        f"{known}; or force one with data.format=NAME."
    )


# ---------------------------------------------------------------- kinds of values


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_turn, value))


def _is_completion(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("rank"), (int, float))
        and (isinstance(value.get("completion"), str) or _is_turns(value.get("completion")))
    )


VALUE_KINDS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "turns": _is_turns,
    "turn": _is_turn,
    "string or turns": lambda value: isinstance(value, str) or _is_turns(value),
    "ranked completions": lambda value: isinstance(value, list) and all(map(_is_completion, value)),
    "transcript": lambda value: isinstance(value, str) and value.startswith("\n\nHuman:"),
}
"""Kinds of values by name. A turn is {role, content} or {from, value}; a ranked completion is {rank, completion}."""


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    return next((kind for kind, matches in VALUE_KINDS.items() if matches(value)), type(value).__name__)


# ---------------------------------------------------------------- turns


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response")


def _turns(column: str, values: Sequence[Any]) -> list[Turn]:
    return [_turn(column, value) for value in values]


def _turn(column: str, value: Row) -> Turn:
    role_key, text_key = ("role", "content") if {"role", "content"} <= value.keys() else ("from", "value")
    role, content = value[role_key], value[text_key]
    if role in TOOL_ROLES or value.get("tool_calls"):
        raise _Unusable("a turn calls a tool or gives a tool's answer")
    if not isinstance(role, str) or role not in ROLES:
        raise _Malformed(f"'{column}' has a turn of {role_key} {role!r}; known are {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _text(f"'{column}' has a turn whose {text_key}", content)}


def _text(what: str, content: Any) -> str:
    """A turn's text: a string, or parts that are all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise _Malformed(f"{what} must be a string, found {_kind_of(content)}")
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if len(texts) < len(content):
        raise _Unusable("a turn holds more than text")
    return "".join(_text(f"{what} part", text) for text in texts)


def _prompt(column: str, value: Any) -> list[Turn]:
    return [{"role": "user", "content": value}] if isinstance(value, str) else _turns(column, value)


def _answer(column: str, value: Any, prompt: list[Turn]) -> str:
    """The text of an answer: a string, a turn, or turns that may repeat the prompt."""
    if isinstance(value, str):
        return value
    turns = _turns(column, value if isinstance(value, list) else [value])
    return _only(turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns)


def _only(turns: list[Turn]) -> str:
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise _Unusable("an answer is not one assistant turn after the shared prompt")
    return turns[0]["content"]


# ---------------------------------------------------------------- one function for each way to write a pair


Conversation = tuple[list[Turn], str, str]
"""Turns before the answers, chosen, rejected."""


def _explicit(row: Row, *, prompt: str = "prompt") -> Conversation:
    """The prompt has a column of its own."""
    turns = _prompt(prompt, row[prompt])
    return turns, _answer("chosen", row["chosen"], turns), _answer("rejected", row["rejected"], turns)


def _implicit_turns(row: Row) -> Conversation:
    """The prompt is the turns with which both conversations begin: TRL's rule."""
    return _shared_turns(_turns("chosen", row["chosen"]), _turns("rejected", row["rejected"]))


def _implicit_string(row: Row) -> Conversation:
    """The prompt is what both texts begin with, but a space before the answers belongs to the answers: TRL's rule."""
    chosen, rejected = row["chosen"], row["rejected"]
    shared = _shared(chosen, rejected)
    if shared and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise _Unusable("chosen and rejected share no prompt")
    return _prompt("chosen", chosen[:shared]), chosen[shared:], rejected[shared:]


def _transcripts(row: Row) -> Conversation:
    """Each conversation is one text, as in Anthropic's HH-RLHF."""
    return _shared_turns(_transcript(row["chosen"]), _transcript(row["rejected"]))


def _ultrafeedback(row: Row) -> Conversation:
    """The conversations repeat the prompt. Where they hold only the answers, the prompt's own column is read."""
    return _explicit(row) if len(row["chosen"]) == len(row["rejected"]) == 1 else _implicit_turns(row)


def _alpaca(row: Row) -> Conversation:
    """`instruction` and `input`, joined by a newline, after the exchanges of `history`: LLaMA-Factory's rule."""
    history = row.get("history") or []
    turns: list[Turn] = []
    for exchange in history if isinstance(history, list) else [history]:
        if not (isinstance(exchange, list) and [type(text) for text in exchange] == [str, str]):
            raise _Malformed("'history' must be a list of [question, answer] strings")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    asked = [text for text in (row["instruction"], _optional_text(row, "input")) if text]
    return [*turns, *_prompt("instruction", "\n".join(asked))], row["chosen"], row["rejected"]


def _ranked(row: Row) -> Conversation:
    """Chosen is the completion with the lowest rank, which is the best, and rejected the one with the highest."""
    prompt, completions = _prompt("context", row["context"]), row["completions"]
    if len(completions) < 2:
        raise _Unusable("fewer than two completions")
    best = min(completions, key=lambda completion: completion["rank"])
    worst = max(completions, key=lambda completion: completion["rank"])
    if best["rank"] == worst["rank"]:
        raise _Unusable("all completions have the same rank")
    return (
        prompt,
        _answer("completions", best["completion"], prompt),
        _answer("completions", worst["completion"], prompt),
    )


def _shared_turns(chosen: list[Turn], rejected: list[Turn]) -> Conversation:
    shared = _shared(chosen, rejected)
    return chosen[:shared], _only(chosen[shared:]), _only(rejected[shared:])


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of elements with which both begin. The last element of the shorter one never counts."""
    most = max(min(len(first), len(second)) - 1, 0)
    return next((index for index in range(most) if first[index] != second[index]), most)


def _transcript(text: str) -> list[Turn]:
    parts = re.split(r"\n\n(Human|Assistant):", text)
    return [
        {"role": ROLES[speaker.lower()], "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _optional_text(row: Row, column: str) -> str:
    text = row.get(column) or ""
    if not isinstance(text, str):
        raise _Malformed(f"'{column}' must be a string, found {_kind_of(text)}")
    return text


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Format:
    """One way preference pairs are written down.

    Attributes:
        columns: Column -> kind of its values, one of VALUE_KINDS.
        read: Makes a conversation of a row whose columns are of these kinds.
        optional: Columns that are read if the row has them.
        alone: Whether the format is recognised only where no other column might be the prompt.
    """

    columns: dict[str, str]
    read: Callable[[Row], Conversation]
    optional: tuple[str, ...] = ("system",)
    alone: bool = False

    def fits(self, row: Row) -> bool:
        """Whether the row has every column, with a value of its kind."""
        return all(VALUE_KINDS[kind](row.get(column)) for column, kind in self.columns.items())

    def has_others(self, row: Row) -> bool:
        """Whether the row has another column that holds text, turns or null and might be the prompt."""
        others = [value for column, value in row.items() if column not in (*self.columns, *self.optional)]
        return any(value is None or VALUE_KINDS["string or turns"](value) for value in others)

    def __str__(self) -> str:
        return ", ".join(f"{column} ({kind})" for column, kind in self.columns.items())


def _answers(kind: str) -> dict[str, str]:
    return {"chosen": kind, "rejected": kind}


FORMATS: dict[FormatName, Format] = {
    "trl": Format({"prompt": "string", **_answers("string")}, _explicit),
    "trl_messages": Format({"prompt": "turns", **_answers("turns")}, _explicit),
    "ultrafeedback_binarized": Format({"prompt": "string", **_answers("turns")}, _ultrafeedback),
    "llama_factory": Format(
        {"instruction": "string", **_answers("string")}, _alpaca, optional=("input", "history", "system")
    ),
    "llama_factory_sharegpt": Format(
        {"conversations": "turns", **_answers("turn")}, partial(_explicit, prompt="conversations")
    ),
    "llama_factory_openai": Format({"messages": "turns", **_answers("turn")}, partial(_explicit, prompt="messages")),
    "nemo_rl": Format({"context": "string or turns", "completions": "ranked completions"}, _ranked),
    "nemo_rl_binary": Format({"prompt": "turns", **_answers("string")}, _explicit),
    "hh_rlhf": Format(_answers("transcript"), _transcripts),
    "trl_implicit_prompt": Format(_answers("string"), _implicit_string, alone=True),
    "trl_implicit_prompt_messages": Format(_answers("turns"), _implicit_turns),
}
"""Formats in the order in which they are tried: first those in which the prompt has a column of its own."""


def _pair(format: Format, number: int, row: Any) -> TextPair:
    """Check one row and read it."""
    if not isinstance(row, dict):
        raise _Malformed(f"expected an object with named columns, found {type(row).__name__}")
    missing = [column for column in format.columns if row.get(column) is None]
    if missing:
        raise _Malformed(f"{' and '.join(missing)} missing; the row has {', '.join(map(str, row)) or 'no columns'}")
    for column, kind in format.columns.items():
        if not VALUE_KINDS[kind](row[column]):
            raise _Malformed(f"'{column}' must hold {kind}, found {_kind_of(row[column])}")
    if any(row.get(column) for column in ("images", "videos", "audios")):
        raise _Unusable("images, videos or sound belong to the row")
    if row.get("tools") not in (None, "", "[]", []):
        raise _Unusable("tools belong to the row")
    turns, chosen, rejected = format.read(row)
    return _checked(TextPair((*_system(row, turns), *turns), chosen, rejected, number))


def _system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The `system` column as a turn, unless the conversation begins with a system turn."""
    text = _optional_text(row, "system")
    return [{"role": "system", "content": text}] if text and [turn["role"] for turn in turns[:1]] != ["system"] else []


def _checked(pair: TextPair) -> TextPair:
    roles = [turn["role"] for turn in pair.messages]
    if roles[-1:] != ["user"]:
        raise _Unusable("the turn before the answers is not the user's")
    if "system" in roles[1:]:
        raise _Unusable("a system turn is not the first")
    try:
        "".join(pair.texts).encode()
    except UnicodeEncodeError:  # such as JSON's \ud83d without its second half
        raise _Unusable("the text holds an incomplete character") from None
    return pair
