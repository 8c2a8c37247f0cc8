"""PairRM (LLM-Blender, Jiang et al., arXiv 2306.02561): reads two answers at once and says by how much one is better.

    [CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP]
    M[a, b] = head(h_source, h_candidate1) − head(h_source, h_candidate2)
    score a = mean over b of M[a, b] − M[b, a]

A prompt with n different answers costs n (n − 1) sequences. The code that is published with the weights does not load
in transformers 5; this is written from its description. The head computes in fp32, whatever the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

from tgdpo_megatron.data.rendering import TemplateRefusal
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.reward_models.loading import load_weights
from tgdpo_megatron.reward_models.scorer import Group, RewardModel, Tokens, padded, states_at

SOURCE, CANDIDATES = "<|source|>", ("<|candidate1|>", "<|candidate2|>")
LONGEST_SOURCE, LONGEST = 1224, 2048
"""Most tokens of a prompt, and of a prompt with two answers, which share alike what the prompt leaves."""
TASK = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
"""What stands before a conversation of several turns, spelt as it was in training."""


class PairRMModel(DebertaV2PreTrainedModel):  # type: ignore[misc]  # transformers has no types
    """DeBERTa with the head that compares. Names of tensors are the published ones."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(0),
            nn.Linear(2 * hidden, hidden),
            nn.Tanh(),
            nn.Dropout(0),
            nn.Linear(hidden, getattr(config, "n_tasks", 1)),
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.pretrained_model.get_input_embeddings()

    def forward(self, ids: Tensor, mask: Tensor, sequences: Sequence[Tokens]) -> Tensor:
        """By how much the first answer is better, in logits. [B, T] -> [B] fp32."""
        states = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        source, first, second = states_at(states, sequences).unbind(dim=1)
        left, right = (self.head_layer(torch.cat([source, answer], dim=-1)) for answer in (first, second))
        return (left - right).mean(dim=-1)


@dataclass(frozen=True)
class _Side:
    """A prompt and an answer: the ids that the prompt gives, and those of the answer as the first of two."""

    source: list[int]
    answer: list[int]


class PairRM(RewardModel):
    """PairRM. A score depends on the other answers to the prompt, and σ of a difference is no probability.

    Raises:
        UserError: The tokenizer lacks one of PairRM's marks.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = model.device
        self.vocabulary = model.get_input_embeddings().num_embeddings
        known = tokenizer.get_vocab()
        if missing := [mark for mark in (SOURCE, *CANDIDATES) if mark not in known]:
            raise UserError(f"the tokenizer has no token {missing[0]}, at which PairRM reads.")
        self.marks: list[int] = [known[mark] for mark in (SOURCE, *CANDIDATES)]

    def encode(self, group: Group, answers: Sequence[str]) -> list[_Side | None]:
        """The prompt with each answer, as long as the prompt and two such answers fit."""
        asked, said = texts(group.messages)
        source = self._ids(SOURCE + asked)
        room = (LONGEST - len(source)) // 2 if len(source) <= LONGEST_SOURCE else 0
        sides = [_Side(source, self._ids(CANDIDATES[0] + said(answer))) for answer in answers]
        return [side if len(side.answer) <= room else None for side in sides]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def sequences(self, encoded: Sequence[_Side]) -> list[Tokens]:
        """All ordered pairs of answers: (0, 1), (0, 2), …, (1, 0), (1, 2), …"""
        return [self._pair(first, second) for first, second in permutations(encoded, 2)]

    def _pair(self, first: _Side, second: _Side) -> Tokens:
        """Each part begins with its mark; a text that mentions a mark has it again, later."""
        source, mark, other = self.marks
        place = second.answer.index(mark)
        last = [*second.answer[:place], other, *second.answer[place + 1 :]]
        before = first.source + first.answer
        marks = (first.source.index(source), len(first.source) + first.answer.index(mark), len(before) + place)
        return Tokens(before + last, marks)

    def numbers(self, sequences: Sequence[Tokens]) -> Tensor:
        """By how much the first answer of each pair is better, in logits. [B] fp32."""
        ids, mask = padded(sequences, 0, self.device)
        better: Tensor = self.model(ids, mask, sequences)
        return better

    def scores(self, numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """By how much each answer is better than all answers, in both orders, as a mean."""
        better = np.zeros((len(counts), len(counts)))
        better[~np.eye(len(counts), dtype=bool)] = numbers
        mean: np.ndarray = (better - better.T) @ counts / max(1, counts.sum())
        return mean


def texts(messages: Sequence[Mapping[str, Any]]) -> tuple[str, Callable[[str], str]]:
    """What PairRM reads as the prompt, and what it reads of an answer.

    A single turn is read as it stands. Several are written out, with the assistant's earlier turns in the answer.

    Raises:
        TemplateRefusal: The turns are not the user's and the assistant's in turn.
    """
    roles = [turn["role"] for turn in messages]
    if roles == ["user"]:
        return messages[0]["content"], lambda answer: answer
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise TemplateRefusal(
            "PairRM reads conversations in which the user and the assistant take turns, without a system turn or "
            f"tools; this one has {', '.join(roles)}; leave such prompts out."
        )
    asked = [turn["content"] for turn in messages[::2]]
    prompt = "\n".join(f"USER: {text}\nAssistant: <Response {number}>" for number, text in enumerate(asked, start=1))

    def said(answer: str) -> str:
        replies = [*(turn["content"] for turn in messages[1::2]), answer]
        return "\n".join(f"<Response {number}>: {text}" for number, text in enumerate(replies, start=1))

    return TASK + prompt, said


def load(folder: Path, device: torch.device) -> PairRM:
    """Load the PairRM of a folder.

    Raises:
        UserError: No tokenizer, or weights that are damaged or not PairRM's.
    """
    tokenizer = load_tokenizer(folder)
    model = load_weights(PairRMModel, folder, device)
    model.head_layer.float()
    return PairRM(model, tokenizer)
