"""Prompts to sample answers to: read from pairs of any format or from lists, rendered by the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from tgdpo_megatron.bounded import read_text
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.formats import TextPair, texts_of
from tgdpo_megatron.data.formats.readers import Conversation, instruction
from tgdpo_megatron.data.formats.recognition import Ambiguous, format_of, recognise, renamed
from tgdpo_megatron.data.formats.table import PROMPTS, Format
from tgdpo_megatron.data.formats.turns import read_prompt
from tgdpo_megatron.data.formats.values import KINDS, Row, Turn, kind_of
from tgdpo_megatron.data.read import NumberedRows, place, read_rows
from tgdpo_megatron.data.rendering import TemplateRefusal
from tgdpo_megatron.data.tokenizer import AS_THEY_ARE, encode_prompt, special_tokens
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.sampling.engine import prompt_id

SOURCE_FIELDS = (
    *("id", "uid", "question_id", "prompt_id", "dataset", "source", "subset", "task", "language"),
    *("category", "subcategory", "cluster"),
)
"""Fields of a row that name it or say where it is from, and are kept beside the answers."""
REPEATED = "the prompt was there before"
"""Why a prompt is left out that was asked already."""
_TEXT_LIMIT = 2**30
"""Largest .txt file, in bytes."""
_SHOWN_FROM = 5000


@dataclass(frozen=True)
class Prompt:
    """A prompt, as the model is given it.

    Attributes:
        asked: The turns, and the tools that the model may call.
        source: Number of its row or line, those of SOURCE_FIELDS that the row has, and its part, if there are parts.
        text: What the chat template made of it.
        ids: Token ids. int32.
    """

    asked: TextPair
    source: dict[str, Any]
    text: str
    ids: np.ndarray

    @cached_property
    def id(self) -> str:
        """As a line of the file of answers names it."""
        return prompt_id(self.ids)

    @property
    def written(self) -> str | list[Turn]:
        """The text where the prompt is one turn of the user, else all turns."""
        turns = list(self.asked.messages)
        only = len(turns) == 1 and turns[0].keys() == {"role", "content"}
        return turns[0]["content"] if only and turns[0]["role"] == "user" else turns


@dataclass
class Prompts:
    """The prompts of a file, each once, in their order.

    Attributes:
        path: The file.
        asked: The prompts, with the numbers of their rows. Their answers, if they had any, mean nothing.
        sources: Number of a row -> its Prompt.source.
        left_out: Reason -> numbers of the rows left out for it.
    """

    path: Path
    asked: list[TextPair]
    sources: dict[int, dict[str, Any]]
    left_out: dict[str, list[int]] = field(default_factory=dict)


def read_prompts(path: Path, data: DataConfig) -> Prompts:
    """Read the prompts of a file: pairs of any format, rows with a prompt, or a .txt file with a prompt in each line.

    Args:
        data: `format` and `columns` say how rows are read, as for pairs.

    Raises:
        UserError: A source that read_rows refuses, rows without a prompt, or malformed rows.
    """
    rows = _lines(path) if path.suffix == ".txt" else renamed(path, read_rows(path), data.columns)
    is_pairs = data.format is not None or _is_pair(rows[0][1])
    asked, left_out = texts_of(
        path, rows, *(format_of(path, rows, data.format) if is_pairs else _prompt_format(path, rows))
    )
    once = {json.dumps([text.messages, text.tools]): text for text in reversed(asked)}
    first = {text.row for text in once.values()}
    if repeated := [text.row for text in asked if text.row not in first]:
        left_out[REPEATED] = repeated
    sources = {number: _source(number, row) for number, row in rows if number in first}
    return Prompts(path, [text for text in asked if text.row in first], sources, left_out)


def _lines(path: Path) -> NumberedRows:
    """The lines of a .txt file as rows."""
    lines = read_text(path, what="list of prompts", limit=_TEXT_LIMIT).split("\n")
    rows: NumberedRows = [(number, {"prompt": line}) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: the file holds no prompts.")
    return rows


def _is_pair(row: Any) -> bool:
    """Whether a row has a format of pairs, or cannot be told from one."""
    try:
        return isinstance(row, dict) and recognise(row) is not None
    except Ambiguous:
        return True


def _prompt_format(path: Path, rows: NumberedRows) -> tuple[str, Format]:
    """How rows are read that hold a prompt and no pair of answers.

    Raises:
        UserError: The first row has no column with a prompt.
    """
    number, row = rows[0]
    if isinstance(row, str):
        raise UserError(f"{path}: holds texts alone; give them as a .txt file, or as objects with the field 'prompt'.")
    if not isinstance(row, dict):
        raise UserError(f"{place(path, number)}: expected an object with named columns, found {kind_of(row)}.")
    column = next((name for name in PROMPTS if KINDS["string or turns"](row.get(name))), None)
    if column is None:
        raise UserError(
            f"{path}: no column holds a prompt, which is a string or turns; known names are {', '.join(PROMPTS)}, and "
            f"the first row has {', '.join(row) or 'no columns'}; name it with data.columns={{prompt: NAME}}."
        )
    more = ("input", "history") if column == "instruction" else ()
    read = partial(_without_answer, column=column)
    return "prompts", Format({column: "string or turns"}, read, optional=(*more, "system", "system_prompt"))


def _without_answer(row: Row, *, column: str) -> Conversation:
    """The turns of a prompt. An answer at the end, as data for fine-tuning have it, is left out."""
    alone = column == "instruction" and isinstance(row[column], str)
    turns = instruction(row) if alone else read_prompt(column, row[column])
    return (turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns), "", ""


def _source(number: int, row: Row) -> dict[str, Any]:
    kept = {name: row[name] for name in SOURCE_FIELDS if isinstance(row.get(name), (str, int, float))}
    return {"row": number, **kept}


# ---------------------------------------------------------------- token ids


def encode_prompts(
    prompts: Prompts, tokenizer: Any, data: DataConfig, *, max_length: int, max_prompt_tokens: int | None = None
) -> list[Prompt]:
    """Render and tokenise prompts. `prompts.left_out` gets those that cannot be used, or are there twice as token ids.

    Args:
        data: `special_tokens` says what is done with texts that hold special tokens, `template` that none is used.
        max_length: Most tokens that the model takes.
        max_prompt_tokens: Longer prompts are left out.

    Raises:
        UserError: A template that fails, a text with a special token, a prompt that fills the model, or no prompt left.
    """
    special = None if data.template == AS_THEY_ARE or data.special_tokens == "keep" else special_tokens(tokenizer)
    encoded: dict[str, Prompt] = {}
    for text in _with_progress(prompts.asked):
        where = place(prompts.path, text.row)
        if found := special and next(filter(None, map(special.search, text.texts)), None):
            if data.special_tokens == "refuse":
                raise UserError(
                    f"{where}: the prompt holds '{found[0]}', a special token or a mark of a chat template; leave such "
                    "prompts out with data.special_tokens=drop, or keep them with data.special_tokens=keep."
                )
            prompts.left_out.setdefault("a text holds a special token", []).append(text.row)
            continue
        try:
            rendered, ids = encode_prompt(tokenizer, text.messages, text.tools)
        except TemplateRefusal as refusal:
            prompts.left_out.setdefault(str(refusal), []).append(text.row)
            continue
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            prompts.left_out.setdefault(f"longer than {max_prompt_tokens} tokens", []).append(text.row)
            continue
        if len(ids) >= max_length:
            raise UserError(
                f"{where}: the prompt has {len(ids):,} tokens, and the model takes {max_length:,} with the answer; "
                "leave long prompts out with --max-prompt-tokens."
            )
        prompt = Prompt(text, prompts.sources[text.row], rendered, np.asarray(ids, dtype=np.int32))
        if prompt.id in encoded:  # a template may write different turns alike, such as those that end in a space
            prompts.left_out.setdefault(REPEATED, []).append(text.row)
        else:
            encoded[prompt.id] = prompt
    if not encoded:
        reasons = "; ".join(f"{len(rows)} left out: {reason}" for reason, rows in prompts.left_out.items())
        raise UserError(f"{prompts.path}: no prompt is left ({reasons}).")
    return list(encoded.values())


def _with_progress(asked: Sequence[TextPair]) -> Iterable[TextPair]:
    from tqdm import tqdm

    return tqdm(asked, desc="tokenising", unit="prompt", disable=len(asked) < _SHOWN_FROM)
