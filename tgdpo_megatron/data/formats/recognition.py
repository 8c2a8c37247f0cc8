"""Which format rows have, and what to say where they have none."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from tgdpo_megatron.config import FormatName
from tgdpo_megatron.data.formats.table import FORMATS, Format
from tgdpo_megatron.data.formats.values import KINDS, Row, kind_of
from tgdpo_megatron.data.read import NumberedRows, place
from tgdpo_megatron.errors import UserError


class Ambiguous(Exception):
    """Several columns may be the prompt."""


def recognise(row: Row) -> tuple[FormatName, Format] | None:
    """The format that a row has, by its columns and their kinds; None if it has no known one.

    Raises:
        Ambiguous: Several columns may be the prompt.
    """
    for name, forms in FORMATS.items():
        fitting = [one for one in forms if one.recognises(row)]
        joined = {column for one in fitting for column in one.optional}
        prompts = {one.first: one for one in reversed(fitting) if one.first not in joined}
        if len(prompts) > 1 and "prompt" not in prompts:
            raise Ambiguous(*reversed(prompts))
        if prompts:
            return name, prompts.get("prompt") or next(iter(prompts.values()))
    return None


def format_of(path: Path, rows: NumberedRows, format: FormatName | None) -> tuple[FormatName, Format]:
    """The format of the first row, or the given format if the first row has it.

    Raises:
        UserError: The row does not fit. The sentence names the nearest format, and how to rename columns so that it
            fits, or says what other kind of data this is.
    """
    number, row = rows[0]
    if not isinstance(row, dict):
        raise UserError(f"{place(path, number)}: expected an object with named columns, found {type(row).__name__}.")
    if format is not None:
        for one in FORMATS[format]:
            if one.fits(row):
                return format, one
        least = min(FORMATS[format], key=lambda one: len(one.columns))
        raise UserError(f"{path}: data.format={format} needs {least}; the first row has {_seen(row)}.")
    try:
        found = recognise(row)
        if found is None:
            raise UserError(f"{path}: {_refusal(row)}; the first row has {_seen(row)}.")
    except Ambiguous as error:
        raise UserError(
            f"{path}: {' and '.join(error.args)} may both be the prompt; say which with "
            f"{_setting({'prompt': error.args[0]})}."
        ) from None
    return found


# ---------------------------------------------------------------- renamed columns


def renamed(path: Path, rows: NumberedRows, columns: Mapping[str, str]) -> NumberedRows:
    """The rows with columns renamed as data.columns says: our name -> the file's.

    Raises:
        UserError: No format has a column of our name, or no row has the file's.
    """
    ours = {column for forms in FORMATS.values() for one in forms for column in (*one.columns, *one.optional)}
    theirs = dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row)
    for name, column in columns.items():
        if name not in ours:
            raise UserError(f"data.columns: no format has a column '{name}'{_nearest_name(name, ours)}.")
        if column not in theirs:
            raise UserError(
                f"{path}: data.columns names the column '{column}', which no row has{_nearest_name(column, theirs)}."
            )
    return [(number, _renamed(row, columns) if isinstance(row, dict) else row) for number, row in rows]


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    kept = {name: value for name, value in row.items() if name not in (*columns, *columns.values())}
    return {name: row[column] for name, column in columns.items() if column in row} | kept


def _nearest_name(name: str, known: Iterable[str]) -> str:
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean '{close[0]}'"
    return f"; known are {', '.join(known)}"


def _setting(columns: Mapping[str, str]) -> str:
    """The setting, as it is typed in a shell."""
    written = [f"{name}: {column if _is_plain(column) else json.dumps(column)}" for name, column in columns.items()]
    return f"'data.columns={{{', '.join(written)}}}'"


def _is_plain(column: str) -> bool:
    """Whether YAML reads a name as it is: `no` would be false, and `1` a number."""
    return bool(re.fullmatch(r"[\w.-]+", column)) and yaml.safe_load(column) == column


# ---------------------------------------------------------------- what to say where no format fits


def _seen(row: Row) -> str:
    return ", ".join(f"{column} ({kind_of(value)})" for column, value in row.items()) or "no columns"


def _refusal(row: Row) -> str:
    unknown = "not a known format of preference pairs"
    columns = _columns_by_meaning(row)
    if columns and (found := recognise(_renamed(row, columns))):
        return f"{unknown}; with {_setting(columns)} it is read as {found[0]}"
    if other := _other_data(row):
        return f"holds {other}, not preference pairs, which have two answers to each prompt"
    name, nearest = _nearest_format(row)
    missing = {column: kind for column, kind in nearest.columns.items() if not KINDS[kind](row.get(column))}
    *needs, last = [f"{column} ({kind})" for column, kind in missing.items()]
    refusal = f"{unknown}; the nearest is {name}, which also needs {', '.join(needs)}{' and ' if needs else ''}{last}"
    if absent := [column for column in missing if column not in row]:
        refusal += f"; if such a column has another name, give it with {_setting(dict.fromkeys(absent, 'NAME'))}"
    return refusal


REJECTED = {"rejected", "bad", "worse", "worst", "dispreferred", "non", "loser", "lose", "negative", "neg", "wrong"}
CHOSEN = {"chosen", "good", "better", "best", "preferred", "accepted", "winner", "win", "positive", "pos", "correct"}
ASKED = {"prompt", "question", "query", "instruction", "input", "context", "problem", "request", "user", "messages"}
MEANT = {"rejected": REJECTED, "chosen": CHOSEN, "prompt": ASKED}
"""Words in the names of columns that tell what they hold."""


def _columns_by_meaning(row: Row) -> dict[str, str] | None:
    """What would have to be renamed to `prompt`, `chosen` and `rejected`; None where names do not tell."""
    left = [name for name, value in row.items() if KINDS["string, turn or turns"](value) and name != "system"]
    columns: dict[str, str] = {}
    for role, telling in MEANT.items():
        named = [name for name in left if telling.intersection(re.findall("[a-z]+", name.lower()))]
        if len(named) > 1:
            return None
        if named:
            columns[role] = named[0]
            left.remove(named[0])
    absent = [role for role in MEANT if role not in columns]
    # Where the answers have the names of formats whose prompt is what both begin with, another column is no prompt.
    implicit = columns.get("chosen") == "chosen" and columns.get("rejected") == "rejected"
    if len(absent) == len(left) == 1 and not implicit:
        columns[absent[0]] = left[0]
    if not {"chosen", "rejected"} <= columns.keys():
        return None
    return {role: columns[role] for role in reversed(MEANT) if columns.get(role, role) != role}


SAID = {"completion", "response", "answer", "output", "solution"}
CONVERSATIONS = {"messages", "conversations", "conversation"}
RATINGS = {"helpfulness", "score", "rating", "reward", "overall_score"}


def _other_data(row: Row) -> str | None:
    """What the rows are where they hold no two answers to a prompt; None where that is not clear."""
    names = set(row)
    texts = [name for name, value in row.items() if KINDS["string, turn or turns"](value)]
    if names & {"label", "kto_tag", "is_desirable"} and names & (SAID | CONVERSATIONS):
        return "single answers marked good or bad (data for KTO)"
    if names >= {"completions", "labels"}:
        return "answers marked step by step (data for process rewards)"
    if names >= {"message_id", "parent_id"}:
        return "the messages of a tree, one in each row"
    if names & SAID and names & RATINGS:
        return "single answers with ratings"
    if names & {"reward_model", "ground_truth"}:
        return "prompts with a reference to check answers by (data for reinforcement learning)"
    if names & CONVERSATIONS or (SAID & set(texts) and names & ASKED):
        return "one answer to each prompt (data for supervised fine-tuning)"
    if names & ASKED and len(texts) == 1 and not any(isinstance(row[name], (list, dict)) for name in names - ASKED):
        return "prompts without answers"
    if texts == ["text"]:
        return "plain text"
    return None


def _nearest_format(row: Row) -> tuple[FormatName, Format]:
    """The format of which the row has the largest share of columns; `trl` where it has none of any."""
    every = [(name, one) for name, forms in FORMATS.items() for one in forms if not one.fits(row)]

    def share(named: tuple[FormatName, Format]) -> float:
        columns = named[1].columns
        return sum(KINDS[kind](row.get(column)) for column, kind in columns.items()) / len(columns)

    nearest = max(every, key=share)
    return nearest if share(nearest) else ("trl", FORMATS["trl"][0])
