"""Turn text pairs into token ids once, and keep the ids on disk with the identity of everything that shaped them.

A prepared folder holds `pairs.safetensors` and `summary.json`. Sequence 2i is the prompt and chosen response of pair i.
Sequence 2i+1 is the same prompt and the rejected response.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save

from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.formats import TextPair, TextPairs, read_pairs
from tgdpo_megatron.data.mapped import map_arrays
from tgdpo_megatron.data.read import commit_of, place, source_files
from tgdpo_megatron.data.rendering import TemplateRefusal
from tgdpo_megatron.data.tokenizer import (
    AS_THEY_ARE,
    check_template,
    encode_prompt,
    encode_response,
    kwargs_of,
    render,
    special_tokens,
    template_hash,
    tokenizer_hash,
)
from tgdpo_megatron.data.tool_forms import check_forms, uses_tools
from tgdpo_megatron.data.truncation import fit
from tgdpo_megatron.errors import UserError, in_short

VERSION = 5
"""Version of a folder of prepared pairs."""
_UNKNOWN = -1
LENGTH_BINS = tuple(2**power for power in range(4, 16))
"""Largest length of each bin of the histograms, in tokens. One more bin holds greater lengths."""


@dataclass
class Summary:
    """How many rows of a source were kept and dropped, and the identity of everything that shaped the pairs."""

    source: str
    commit: str = ""
    """Of a data set on a hub: its commit."""
    rows: int = 0
    pairs: int = 0
    format: str = ""
    """Format of the rows: a name in data/formats/table.py."""
    columns: list[str] = field(default_factory=list)
    """Columns that were read."""
    renamed: dict[str, str] = field(default_factory=dict)
    """data.columns: our name of a column -> the file's."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> row numbers."""
    prompts_cut: int = 0
    responses_cut: int = 0
    """Responses that lost their end, and with it the token that closes their turn."""
    prompts_apart: int = 0
    """Pairs whose two prompts differ as tokens. They share no prompt, see PreparedPairs.shares_prompt."""
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest_sequence: int = 0
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    """Histograms of the kept pairs' `prompt`, `chosen` and `rejected`: bin in tokens (`17-32`) -> pairs."""
    tokenizer: str = ""
    template: str = ""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the template was given. The hash `template` holds it too."""
    max_length: int = 0
    truncation: str = ""
    special_tokens: str = ""
    pairs_hash: str = ""
    parts: list[Summary] = field(default_factory=list)
    """Where the pairs are from several files: the summary of each file, in the order in which their pairs stand."""
    version: int = VERSION

    def read_as(self) -> str:
        """The format and columns of the rows, in one line."""
        return f"read as {self.format} (columns {', '.join(self.columns)})"

    def sentences(self) -> str:
        """How many rows were kept, cut and dropped, in one line."""
        dropped = "; ".join(f"{len(rows)} dropped: {reason} (row {few(rows)})" for reason, rows in self.dropped.items())
        mean = self.response_tokens / max(1, 2 * self.pairs)
        text = f"{self.source}: {self.pairs} of {self.rows} pairs kept, {mean:.0f} tokens per response on average"
        side = "right" if self.truncation == "proportional" else "left"
        text += f", {self.prompts_cut} prompts cut from the {side}" if self.prompts_cut else ""
        text += f", {self.responses_cut} responses cut, without end of turn" if self.responses_cut else ""
        text += f", {self.prompts_apart} pairs with two different prompts" if self.prompts_apart else ""
        return f"{text}; {dropped or 'none dropped'}."


@dataclass(frozen=True)
class PreparedPairs:
    """Tokenised pairs, in memory or mapped from a file, which cannot be written to.

    Attributes:
        tokens: All sequences, one after another. int32.
        starts: Sequence s is tokens[starts[s]:starts[s+1]]. [2N+1] int64.
        prompt_lengths: Number of prompt tokens at the start of both sequences of a pair. [N] int32.
        hashes: SHA-256 of a pair's ids and prompt length. [N, 32] uint8.
        rows: Number of the pair's row or line in its file. [N] int64.
        prompts: Start of the SHA-256 of the turns before the answers, as text. [N, 8] uint8; empty for pairs that were
            not read from a file.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    hashes: np.ndarray
    rows: np.ndarray
    summary: Summary
    prompts: np.ndarray = field(default_factory=lambda: np.empty((0, 8), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def sequence(self, pair: int, side: int) -> np.ndarray:
        """Token ids of one response with its prompt. [L] int32."""
        first = 2 * pair + side
        return self.tokens[self.starts[first] : self.starts[first + 1]]

    def lengths(self, sides: Sequence[int]) -> np.ndarray:
        """Number of tokens of each pair that the model reads. [N] int64."""
        return self.sequence_lengths(sides).sum(axis=1)

    def sequence_lengths(self, sides: Sequence[int], picked: np.ndarray | None = None) -> np.ndarray:
        """Number of tokens of each sequence that the model reads: all but the last. [N, sides] int64.

        Args:
            picked: Indices of the only pairs that are wanted, so that a step costs no more where there are more pairs.
                [n] int64, which makes the result [n, sides].
        """
        pairs = slice(None) if picked is None else picked
        begins, ends = (places.reshape(-1, 2)[pairs] for places in (self.starts[:-1], self.starts[1:]))
        both: np.ndarray = ends - begins - 1
        return both[:, list(sides)]

    def shares_prompt(self, pair: int) -> bool:
        """Whether both responses of a pair continue the same tokens.

        Every rank asks this of all pairs of a step. A prompt is read when it is first asked for, and the answer kept,
        so that a process reads it at most once, and none of the pairs that it never meets.
        """
        if self._shares[pair] == _UNKNOWN:
            prompt, begins = int(self.prompt_lengths[pair]), self.starts[2 * pair : 2 * pair + 2].tolist()
            chosen, rejected = (self.tokens[begin : begin + prompt].tobytes() for begin in begins)
            self._shares[pair] = chosen == rejected  # of so few tokens, bytes are compared faster than arrays
        return bool(self._shares[pair])

    @cached_property
    def _shares(self) -> np.ndarray:
        """What shares_prompt has found: 0, 1 or _UNKNOWN. [N] int8."""
        return np.full(len(self), _UNKNOWN, dtype=np.int8)

    def response_length(self, pair: int, side: int) -> int:
        """Number of tokens of a response, the closing end-of-turn token included."""
        first = 2 * pair + side
        return int(self.starts[first + 1] - self.starts[first] - self.prompt_lengths[pair])

    @property
    def files(self) -> list[Summary]:
        """The summaries of the files that the pairs are from, in the order in which their pairs stand."""
        return self.summary.parts or [self.summary]

    def file_of(self, pair: int) -> Summary:
        """The summary of the file that a pair is from."""
        if not self.summary.parts:
            return self.summary
        ends = np.cumsum([part.pairs for part in self.summary.parts])
        return self.summary.parts[int(np.searchsorted(ends, pair, side="right"))]

    def name(self, pair: int) -> str:
        """The name of a pair in error messages."""
        return f"row {self.rows[pair]} of {Path(self.file_of(pair).source).name}"

    def names(self, pairs: Sequence[int] | np.ndarray) -> str:
        """The names of some pairs, the first eight of them, in error messages."""
        more = ", …" if len(pairs) > 8 else ""
        if self.summary.parts:
            return ", ".join(self.name(int(pair)) for pair in pairs[:8]) + more
        rows = ", ".join(str(self.rows[pair]) for pair in pairs[:8])
        return f"rows {rows}{more} of {Path(self.summary.source).name}"


def prepare_pairs(config: DataConfig, source: Path, tokenizer: Any, folder: Path) -> PreparedPairs:
    """Tokenise `source` into `folder`. Where `source` is a folder of prepared pairs, check and read it instead.

    Raises:
        UserError: A source that read_pairs refuses, no pair left, or a prepared folder that was made with another
            tokenizer, template, format or rule for lengths.
    """
    prepared = tokenised(config, source, tokenizer)
    if is_prepared(source):
        return prepared
    save_prepared(prepared, folder)
    return load_prepared(folder)


def tokenised(config: DataConfig, source: Path, tokenizer: Any) -> PreparedPairs:
    """The tokenised pairs of `source`, which may be a folder of prepared pairs. Nothing is written.

    Raises:
        UserError: As prepare_pairs.
    """
    if not is_prepared(source):
        return _tokenise(read_pairs(source, config.format, config.columns), source, tokenizer, config)
    prepared = load_prepared(source)
    for part in prepared.files:
        _check_identity(part, source, tokenizer, config)
    _check_hashes(prepared, source)
    prepared.summary.prompts_apart = _prompts_apart(prepared)  # another program may have left it out
    return prepared


def is_prepared(source: Path) -> bool:
    """Whether a source is a folder of prepared pairs, damaged or not, and not a source of text."""
    return any((source / name).is_file() for name in ("summary.json", "pairs.safetensors"))


def source_hash(config: DataConfig, source: Path, tokenizer: Any) -> str:
    """SHA-256 of everything that shapes the tokenised pairs of a file or of a saved `datasets` folder.

    The format is hashed as the configuration gives it. Where the configuration gives none, the content determines it.

    Raises:
        UserError: No such source.
    """
    read = [config.format, sorted(config.columns.items())]
    cut = [config.max_length, config.truncation, config.special_tokens]
    parts = [tokenizer_hash(tokenizer), template_hash(tokenizer), *read, *cut, VERSION]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for path in source_files(source):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def few(rows: list[int], most: int = 5) -> str:
    """The first row numbers of a list."""
    return ", ".join(map(str, rows[:most])) + (", …" if len(rows) > most else "")


def load_prepared(folder: Path) -> PreparedPairs:
    """Open a folder written by prepare_pairs. Its arrays stay on disk, see data/mapped.py.

    Raises:
        UserError: It is not such a folder, or cannot be read.
    """
    content = read_json(folder / "summary.json", what="summary of prepared pairs")
    try:
        if content.get("version") != VERSION:
            raise UserError(
                f"{folder}: the pairs were prepared by another version of this program; prepare them again."
            )
        content["parts"] = [Summary(**part) for part in content["parts"]]
        prepared = PreparedPairs(summary=Summary(**content), **map_arrays(folder / "pairs.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a folder of prepared pairs ({in_short(error)}).") from error
    _check_shapes(prepared, folder)
    return prepared


def _check_shapes(prepared: PreparedPairs, folder: Path) -> None:
    pairs, last = len(prepared), int(prepared.starts[-1]) if prepared.starts.size else -1
    shapes = {
        "tokens": (last,),
        "starts": (2 * pairs + 1,),
        "prompt_lengths": (pairs,),
        "hashes": (pairs, 32),
        "rows": (pairs,),
        "prompts": (pairs, 8),
    }
    for name, shape in shapes.items():
        array = getattr(prepared, name)
        if array.shape != shape or array.dtype.kind not in "iu":
            raise UserError(
                f"{folder}: the prepared pairs were altered ({name} has another shape); prepare them again."
            )
    responses = np.diff(prepared.starts).reshape(-1, 2).min(axis=1) - prepared.prompt_lengths
    empty = np.flatnonzero((prepared.prompt_lengths < 1) | (responses < 1))
    if empty.size:
        raise UserError(
            f"{folder}: pair {int(empty[0])} of the prepared pairs has an empty prompt or response; prepare them again."
        )


def _check_identity(summary: Summary, source: Path, tokenizer: Any, config: DataConfig) -> None:
    expected = {
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template_kwargs": kwargs_of(tokenizer),
        "template": template_hash(tokenizer),
        "max_length": config.max_length,
        "truncation": config.truncation,
        "special_tokens": config.special_tokens,
    }
    if config.format is not None:
        expected["format"] = config.format
    if config.columns:
        expected["renamed"] = config.columns
    for name, value in expected.items():
        if getattr(summary, name) != value:
            setting = {"renamed": "data.columns", "chat_template_kwargs": "data.chat_template_kwargs"}.get(name, name)
            raise UserError(f"{source}: the prepared pairs were made with another {setting}; prepare them again.")


def _check_hashes(prepared: PreparedPairs, source: Path) -> None:
    """Refuse token ids that were changed: scores are found by these hashes and belong to the unchanged ids."""
    for pair in range(len(prepared)):
        both = [prepared.sequence(pair, side) for side in (0, 1)]
        if pair_hash(int(prepared.prompt_lengths[pair]), both) != prepared.hashes[pair].tobytes():
            raise UserError(f"{source}: the token ids of {prepared.name(pair)} were altered; prepare the pairs again.")


def _tokenise(texts: TextPairs, source: Path, tokenizer: Any, config: DataConfig) -> PreparedPairs:
    try:
        check_template(tokenizer)
    except UserError as error:
        if config.template in (None, AS_THEY_ARE):
            raise
        said = str(error)
        raise UserError(
            f"data.template={config.template}: {said}{'' if said.endswith('.') else '; mend it.'}"
        ) from None
    summary = Summary(
        source=str(source),
        commit=commit_of(source),
        rows=texts.rows,
        format=texts.format,
        columns=list(texts.columns),
        renamed=dict(config.columns),
        dropped={reason: list(rows) for reason, rows in texts.dropped.items()},
        tokenizer=tokenizer_hash(tokenizer),
        template=template_hash(tokenizer),
        chat_template_kwargs=kwargs_of(tokenizer),
        max_length=config.max_length,
        truncation=config.truncation,
        special_tokens=config.special_tokens,
    )
    special = special_tokens(tokenizer)
    sequences: list[np.ndarray] = []
    prompt_lengths, hashes, rows, prompts = [], [], [], []
    for text in _with_progress(texts.pairs):
        try:
            prompt, chosen, rejected = _encode(text, tokenizer, special, config, summary)
        except _Dropped as reason:
            summary.dropped.setdefault(str(reason), []).append(text.row)
            continue
        both = [np.asarray([*prompt, *response], dtype=np.int32) for response in (chosen, rejected)]
        sequences += both
        prompt_lengths.append(len(prompt))
        hashes.append(pair_hash(len(prompt), both))
        rows.append(text.row)
        asked = [text.messages, text.tools] if text.tools else text.messages
        prompts.append(hashlib.sha256(json.dumps(asked).encode()).digest()[:8])
    if not sequences:
        reasons = "; ".join(f"{len(dropped)} dropped: {reason}" for reason, dropped in summary.dropped.items())
        raise UserError(f"{source}: no pair is left to train on ({reasons}; the data is read as {texts.format}).")
    return measured(
        PreparedPairs(
            tokens=np.concatenate(sequences),
            starts=np.cumsum([0, *map(len, sequences)], dtype=np.int64),
            prompt_lengths=np.asarray(prompt_lengths, dtype=np.int32),
            hashes=np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32),
            rows=np.asarray(rows, dtype=np.int64),
            prompts=np.frombuffer(b"".join(prompts), dtype=np.uint8).reshape(-1, 8),
            summary=summary,
        )
    )


def measured(prepared: PreparedPairs) -> PreparedPairs:
    """The same pairs, with what their summary says of their number, lengths and identity filled in."""
    summary, prompts = prepared.summary, prepared.prompt_lengths.astype(np.int64)
    lengths = np.diff(prepared.starts)
    parts = {"prompt": prompts, "chosen": lengths[0::2] - prompts, "rejected": lengths[1::2] - prompts}
    summary.pairs, summary.longest_sequence = len(prepared), int(lengths.max())
    summary.prompt_tokens = 2 * int(prompts.sum())
    summary.response_tokens = int(lengths.sum()) - summary.prompt_tokens
    summary.lengths = {name: _histogram(tokens) for name, tokens in parts.items()}
    summary.prompts_apart = _prompts_apart(prepared)
    summary.pairs_hash = hashlib.sha256(prepared.hashes.tobytes()).hexdigest()
    return prepared


def _prompts_apart(prepared: PreparedPairs) -> int:
    return sum(not prepared.shares_prompt(pair) for pair in range(len(prepared)))


class _Dropped(Exception):
    """A pair is left out; the message is the reason."""


def _encode(
    text: TextPair, tokenizer: Any, special: re.Pattern[str], config: DataConfig, summary: Summary
) -> tuple[list[int], list[int], list[int]]:
    """Ids of the prompt and of both responses, cut to fit. `summary` counts what was cut.

    Raises:
        _Dropped: The pair is left out, and why.
        UserError: A text holds a special token, and data.special_tokens refuses that.
    """
    for side, answer in zip(("chosen", "rejected"), text.answers, strict=True):
        if not answer["content"].strip() and not answer.get("tool_calls"):
            raise _Dropped(f"the {side} response is empty")
    if config.template != AS_THEY_ARE and config.special_tokens != "keep":
        found = next(filter(None, map(special.search, text.texts)), None)
        if found and config.special_tokens == "drop":
            raise _Dropped("a text holds a special token or a mark of a chat template")
        if found:
            raise UserError(
                f"{place(Path(summary.source), text.row)}: the text holds '{found[0]}', a special token or a mark of "
                "a chat template; if the template is written in the texts already, take them as they are with "
                "data.template=none; else leave such rows out with data.special_tokens=drop, or keep them with "
                "data.special_tokens=keep."
            )
    try:
        prompt, responses = encode_text(tokenizer, text)
    except TemplateRefusal as refusal:
        raise _Dropped(str(refusal)) from None
    except UserError as error:
        raise UserError(f"{place(Path(summary.source), text.row)}: {error}") from error
    cut = fit(prompt, responses, config.max_length, config.truncation, tokenizer.bos_token_id)
    if cut is None:
        raise _Dropped(_too_long(config))
    kept, (chosen, rejected) = cut
    if text.tools and config.truncation == "prompt_left" and len(kept) < len(prompt):
        raise _Dropped(
            f"a prompt with tools does not fit data.max_length={config.max_length}, and is not cut; raise it"
        )
    if chosen == rejected:
        raise _Dropped("chosen and rejected are the same")
    summary.prompts_cut += len(kept) < len(prompt)
    summary.responses_cut += sum(len(now) < len(was) for now, was in zip((chosen, rejected), responses, strict=True))
    return kept, chosen, rejected


def encode_text(tokenizer: Any, text: TextPair) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt, and of the chosen and the rejected response, however long they are.

    Raises:
        UserError: As encode_prompt and encode_response.
        TemplateRefusal: As they, or the template leaves out what has to do with tools.
    """
    for answer in text.answers:
        if uses_tools(turns := [*text.messages, answer], text.tools):
            check_forms(lambda turns, tools: render(tokenizer, turns, tools), turns, text.tools)
    rendered, prompt = encode_prompt(tokenizer, text.messages, text.tools)
    responses = [encode_response(tokenizer, text.messages, rendered, answer, text.tools) for answer in text.answers]
    return prompt, responses


def _too_long(config: DataConfig) -> str:
    """Why a pair that data.truncation does not cut is dropped, and what would keep it."""
    whole = {"prompt_left": "a response", "response_right": "a prompt"}.get(config.truncation, "a pair")
    other = " or set data.truncation=response_right" if config.truncation in ("prompt_left", "drop") else ""
    return f"{whole} does not fit data.max_length={config.max_length}; raise it{other}"


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    """Bin -> number of lengths in it, empty bins included."""
    firsts = [1, *(last + 1 for last in LENGTH_BINS)]
    names = [f"{first}-{last}" for first, last in zip(firsts, LENGTH_BINS, strict=False)] + [f"over {LENGTH_BINS[-1]}"]
    counts = np.bincount(np.searchsorted(LENGTH_BINS, lengths), minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def pair_hash(prompt_length: int, sequences: Sequence[np.ndarray]) -> bytes:
    """SHA-256 of a pair's ids and of where its responses begin."""
    digest = hashlib.sha256(np.asarray([prompt_length, *map(len, sequences)], dtype=np.int64).tobytes())
    for sequence in sequences:
        digest.update(sequence.tobytes())
    return digest.digest()


def save_prepared(prepared: PreparedPairs, folder: Path) -> None:
    """Write a folder that load_prepared reads."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("tokens", "starts", "prompt_lengths", "hashes", "rows", "prompts")
    arrays = {name: np.ascontiguousarray(getattr(prepared, name)) for name in names}
    part = folder / "pairs.safetensors.tmp"
    part.write_bytes(save(arrays))  # the library's own writing would report a full disk in its own words
    os.replace(part, folder / "pairs.safetensors")
    (folder / "summary.json").write_text(json.dumps(asdict(prepared.summary), indent=2), encoding="utf-8")


def _with_progress(text_pairs: list[TextPair]) -> Any:
    from tqdm import tqdm

    return tqdm(text_pairs, desc="tokenising", unit="pair", disable=len(text_pairs) < 5000)
