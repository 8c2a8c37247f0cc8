"""T-REG's contrastive prompts: the same response after a prompt for a better answer and one for a worse answer.

A template that quotes the last user turn takes the place of that turn. The response's token ids follow unchanged, as in
training. The two prompts differ in length from each other and from the prompt in training, so scores are stored by
response token and never by position in the sequence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tgdpo_megatron.bounded import read_yaml
from tgdpo_megatron.data.formats import TextPair
from tgdpo_megatron.data.prepare import PreparedPairs, Summary
from tgdpo_megatron.data.tokenizer import encode_prompt
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.scores.store import Key
from tgdpo_megatron.scores.texts import check_text

DEFAULT = Path(__file__).parent / "prompts" / "refine.yaml"
PROMPT_KINDS = ("better", "worse")
"""The two kinds of prompts: one asks for a better response, one for a worse response."""


@dataclass(frozen=True)
class ContrastivePrompts:
    """Two templates for the last user turn, with {instruction} and, if they quote the response, {response}."""

    better: str
    worse: str

    @property
    def hash(self) -> str:
        """SHA-256 of both templates."""
        return hashlib.sha256(f"{self.better}\0{self.worse}".encode()).hexdigest()

    def turn(self, kind: str, instruction: str, response: str) -> str:
        """The user turn that asks for a better or a worse response."""
        given = {"{instruction}": instruction, "{response}": response}
        template: str = getattr(self, kind)
        return re.sub(r"\{instruction\}|\{response\}", lambda found: given[found[0]], template)


def read_prompts(path: Path | None) -> ContrastivePrompts:
    """Read the templates from a YAML file, by default prompts/refine.yaml.

    Raises:
        UserError: The file cannot be read, or a template is missing, lacks a placeholder or has an unknown one.
    """
    path = path or DEFAULT
    content = read_yaml(path, what="file of contrastive prompts")
    if not isinstance(content, dict) or set(content) != set(PROMPT_KINDS):
        raise UserError(f"{path}: expected the two templates 'better' and 'worse', and nothing else.")
    for kind, template in content.items():
        if not isinstance(template, str) or "{instruction}" not in template:
            raise UserError(
                f"{path}: the template '{kind}' has no placeholder {{instruction}}; put it where the task goes."
            )
        for unknown in set(re.findall(r"\{\w*\}", template)) - {"{instruction}", "{response}"}:
            raise UserError(
                f"{path}: the template '{kind}' has an unknown placeholder {unknown}; known are {{instruction}} and "
                "{response}."
            )
    if ("{response}" in content["better"]) != ("{response}" in content["worse"]):
        raise UserError(
            f"{path}: one template quotes {{response}} and the other does not, so their log-probs cannot be compared; "
            "let both quote it, or neither."
        )
    if content["better"] == content["worse"]:
        raise UserError(f"{path}: both templates are the same, so every token reward would be 0; make them differ.")
    return ContrastivePrompts(**content)


def contrastive_sequences(
    data: PreparedPairs,
    pairs: Sequence[int],
    texts: Sequence[TextPair],
    tokenizer: Any,
    prompts: ContrastivePrompts,
    longest: int,
) -> tuple[PreparedPairs, list[Key], list[Key]]:
    """Make a sequence of each response of some pairs under each of the two prompts.

    Prompts are never cut here, because a cut could remove the instruction and keep only the request around it.

    Args:
        pairs: Indices of the pairs in `data`.
        texts: The same pairs as text, in the same order.
        longest: Largest number of tokens of a sequence.

    Returns:
        The sequences, as the chosen responses of pairs that have no rejected response; the key of each sequence's
        scores; and the keys of scores that cannot be computed, because their sequence would be too long.

    Raises:
        UserError: The text of a pair is not the text that was tokenised.
    """
    sequences: list[np.ndarray] = []
    prompt_lengths, shown, keys, too_long = [], [], [], []
    for pair, text in zip(pairs, texts, strict=True):
        check_text(data, pair, text, tokenizer)
        # The last turn may be a tool's, which stays as it is.
        asked = max(place for place, turn in enumerate(text.messages) if turn["role"] == "user")
        for side, response in enumerate((text.chosen, text.rejected)):
            ids = data.sequence(pair, side)[data.prompt_lengths[pair] :]
            if text.beside[side]:  # a thinking block or a call of a tool, as the template writes it
                response = tokenizer.decode(ids, skip_special_tokens=True)
            prompted = {}
            for kind in PROMPT_KINDS:
                turns = list(text.messages)
                turns[asked] = {"role": "user", "content": prompts.turn(kind, turns[asked]["content"], response)}
                prompted[kind] = encode_prompt(tokenizer, turns, text.tools)[1]
            names = [Key(data.hashes[pair].tobytes(), side, kind) for kind in PROMPT_KINDS]
            if max(map(len, prompted.values())) + len(ids) > longest:
                too_long += names  # both kinds, since a reward is their difference
                continue
            for key, prompt in zip(names, prompted.values(), strict=True):
                sequences.append(np.concatenate([np.asarray(prompt, dtype=np.int32), ids]))
                prompt_lengths.append(len(prompt))
                shown.append(pair)
                keys.append(key)
    lengths = np.array([[len(sequence), 0] for sequence in sequences], dtype=np.int64).reshape(-1)
    made = PreparedPairs(
        tokens=np.concatenate([np.empty(0, np.int32), *sequences]),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.asarray(prompt_lengths, dtype=np.int32),
        hashes=np.empty((len(keys), 0), dtype=np.uint8),
        rows=data.rows[np.asarray(shown, dtype=np.int64)],
        summary=Summary(source=data.summary.source, pairs=len(keys), parts=_files(data, shown)),
    )
    return made, keys, too_long


def _files(data: PreparedPairs, shown: Sequence[int]) -> list[Summary]:
    """The summaries of the files that some pairs are from, as PreparedPairs has them; none where there is one file."""
    files = groupby(map(data.file_of, shown if data.summary.parts else ()))
    return [replace(file, pairs=len(list(run))) for file, run in files]
