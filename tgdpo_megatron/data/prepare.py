"""Turn text pairs into token ids once, and keep them on disk under a hash of all that shaped them.

A prepared folder holds `pairs.safetensors` and `summary.json`. Sequence 2i is pair i's chosen response,
2i+1 its rejected one; both start with the same prompt ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tgdpo_megatron.config import DataConfig
from tgdpo_megatron.data.read import TextPair, read_pairs
from tgdpo_megatron.data.tokenizer import encode_prompt, encode_response, template_hash, tokenizer_hash
from tgdpo_megatron.errors import UserError

FORMAT = 1


@dataclass
class Summary:
    """What became of the rows of a file, and the identity of everything that shaped them."""

    source: str
    rows: int = 0
    pairs: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> row numbers."""
    prompts_cut: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest_sequence: int = 0
    tokenizer: str = ""
    template: str = ""
    max_length: int = 0
    pairs_hash: str = ""
    format: int = FORMAT

    def sentences(self) -> str:
        """One line for the console."""
        dropped = "; ".join(
            f"{len(rows)} dropped: {reason} (row {_few(rows)})" for reason, rows in self.dropped.items()
        )
        mean = self.response_tokens / max(1, 2 * self.pairs)
        text = f"{self.source}: {self.pairs} of {self.rows} pairs kept, {mean:.0f} tokens per response on average"
        text += f", {self.prompts_cut} prompts cut from the left" if self.prompts_cut else ""
        return f"{text}; {dropped or 'none dropped'}."


@dataclass(frozen=True)
class PreparedPairs:
    """Tokenised pairs.

    Attributes:
        tokens: All sequences, one after another. int32.
        starts: Sequence s is tokens[starts[s]:starts[s+1]]. [2N+1] int64.
        prompt_lengths: Prompt tokens at the head of both sequences of a pair. [N] int32.
        hashes: SHA-256 of a pair's ids and prompt length. [N, 32] uint8.
        rows: Row of the source file. [N] int64.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    hashes: np.ndarray
    rows: np.ndarray
    summary: Summary

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def sequence(self, pair: int, side: int) -> np.ndarray:
        """Token ids of one response with its prompt. [L] int32."""
        first = 2 * pair + side
        return self.tokens[self.starts[first] : self.starts[first + 1]]

    def lengths(self, sides: Sequence[int]) -> np.ndarray:
        """Tokens that the model reads of each pair: all but the last of each sequence. [N] int64."""
        both = np.diff(self.starts).reshape(-1, 2) - 1
        return both[:, list(sides)].sum(axis=1)

    def response_length(self, pair: int, side: int) -> int:
        """Tokens of the response, the closing end-of-turn token included."""
        first = 2 * pair + side
        return int(self.starts[first + 1] - self.starts[first] - self.prompt_lengths[pair])

    def name(self, pair: int) -> str:
        """How an error message names a pair."""
        return f"row {self.rows[pair]} of {Path(self.summary.source).name}"


def prepare_pairs(config: DataConfig, source: Path, tokenizer: Any, folder: Path) -> PreparedPairs:
    """Tokenise `source` into `folder`; or, where `source` is a folder tokenised before, check and read it.

    Raises:
        UserError: What read_pairs refuses; no pair left; a prepared folder made by another tokenizer,
            template or length limit.
    """
    if source.is_dir():
        prepared = load_prepared(source)
        _check_identity(prepared.summary, source, tokenizer, config)
        return prepared
    text_pairs = read_pairs(source)
    prepared = _tokenise(text_pairs, source, tokenizer, config.max_length)
    _save(prepared, folder)
    return load_prepared(folder)


def source_hash(config: DataConfig, source: Path, tokenizer: Any) -> str:
    """SHA-256 of everything that shapes the tokenised pairs of a file.

    Raises:
        UserError: No such file.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such data file.")
    parts = [tokenizer_hash(tokenizer), template_hash(tokenizer), str(config.max_length), str(FORMAT)]
    return hashlib.sha256(source.read_bytes() + "".join(parts).encode()).hexdigest()


def load_prepared(folder: Path) -> PreparedPairs:
    """Load a folder written by prepare_pairs.

    Raises:
        UserError: Not such a folder, or an unreadable one.
    """
    try:
        summary = Summary(**json.loads((folder / "summary.json").read_text()))
        arrays = load_file(folder / "pairs.safetensors")
    except Exception as error:
        raise UserError(f"{folder}: not a folder of prepared pairs ({str(error).splitlines()[0]}).") from None
    return PreparedPairs(summary=summary, **arrays)


def _check_identity(summary: Summary, source: Path, tokenizer: Any, config: DataConfig) -> None:
    expected = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(tokenizer),
        "max_length": config.max_length,
    }
    for name, value in expected.items():
        if getattr(summary, name) != value:
            raise UserError(f"{source}: the prepared pairs were made with another {name}; prepare them again.")


def _tokenise(text_pairs: list[TextPair], source: Path, tokenizer: Any, max_length: int) -> PreparedPairs:
    summary = Summary(
        source=str(source),
        rows=len(text_pairs),
        tokenizer=tokenizer_hash(tokenizer),
        template=template_hash(tokenizer),
        max_length=max_length,
    )
    sequences: list[np.ndarray] = []
    prompt_lengths, hashes, rows = [], [], []
    for text in _with_progress(text_pairs):
        encoded = _encode(text, tokenizer, max_length, summary)
        if encoded is None:
            continue
        prompt, chosen, rejected = encoded
        both = [np.asarray([*prompt, *response], dtype=np.int32) for response in (chosen, rejected)]
        sequences += both
        prompt_lengths.append(len(prompt))
        hashes.append(_pair_hash(len(prompt), both))
        rows.append(text.row)
        summary.prompt_tokens += 2 * len(prompt)
        summary.response_tokens += len(chosen) + len(rejected)
    if not sequences:
        reasons = ", ".join(f"{len(dropped)} {reason}" for reason, dropped in summary.dropped.items())
        raise UserError(f"{source}: no pair is left to train on ({reasons}).")
    lengths = [len(sequence) for sequence in sequences]
    summary.pairs, summary.longest_sequence = len(rows), max(lengths)
    summary.pairs_hash = hashlib.sha256(b"".join(hashes)).hexdigest()
    return PreparedPairs(
        tokens=np.concatenate(sequences),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.asarray(prompt_lengths, dtype=np.int32),
        hashes=np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32),
        rows=np.asarray(rows, dtype=np.int64),
        summary=summary,
    )


def _encode(
    text: TextPair, tokenizer: Any, max_length: int, summary: Summary
) -> tuple[list[int], list[int], list[int]] | None:
    """Prompt, chosen and rejected ids that fit, or None with the reason counted."""
    reason = None
    if not text.chosen.strip() or not text.rejected.strip():
        reason = f"the {'rejected' if text.chosen.strip() else 'chosen'} response is empty"
    else:
        prompt_text, prompt = encode_prompt(tokenizer, text.prompt)
        chosen = encode_response(tokenizer, text.prompt, prompt_text, text.chosen)
        rejected = encode_response(tokenizer, text.prompt, prompt_text, text.rejected)
        room = max_length - max(len(chosen), len(rejected))
        keeps_bos = int(bool(prompt) and prompt[0] == tokenizer.bos_token_id)
        if chosen == rejected:
            reason = "chosen and rejected are the same"
        elif room < 1 + keeps_bos:
            reason = f"a response does not fit data.max_length={max_length}"
    if reason is not None:
        summary.dropped.setdefault(reason, []).append(text.row)
        return None
    if len(prompt) > room:
        prompt = prompt[:keeps_bos] + prompt[len(prompt) - room + keeps_bos :]
        summary.prompts_cut += 1
    return prompt, chosen, rejected


def _pair_hash(prompt_length: int, sequences: list[np.ndarray]) -> bytes:
    digest = hashlib.sha256(np.asarray([prompt_length, *map(len, sequences)], dtype=np.int64).tobytes())
    for sequence in sequences:
        digest.update(sequence.tobytes())
    return digest.digest()


def _save(prepared: PreparedPairs, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(prepared, name) for name in ("tokens", "starts", "prompt_lengths", "hashes", "rows")}
    save_file(arrays, folder / "pairs.safetensors.tmp")
    os.replace(folder / "pairs.safetensors.tmp", folder / "pairs.safetensors")
    (folder / "summary.json").write_text(json.dumps(asdict(prepared.summary), indent=2))


def _few(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")


def _with_progress(text_pairs: list[TextPair]) -> Any:
    from tqdm import tqdm

    return tqdm(text_pairs, desc="tokenising", unit="pair", disable=len(text_pairs) < 5000)
