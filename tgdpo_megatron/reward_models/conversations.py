"""Reward models that read a prompt and one answer as a conversation, in the words of their chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgdpo_megatron.data.tokenizer import encode_conversation
from tgdpo_megatron.reward_models.scorer import Group, RewardModel, Tokens


class ConversationModel(RewardModel):
    """What such models share.

    Args:
        model: The model of transformers.
        longest: Most tokens of a conversation.
    """

    def __init__(self, model: Any, tokenizer: Any, longest: int) -> None:
        self.model, self.tokenizer, self.longest = model, tokenizer, longest
        self.device = model.device
        self.vocabulary = model.get_input_embeddings().num_embeddings

    def encode(self, group: Group, answers: Sequence[str]) -> list[Tokens | None]:
        """The conversation that ends with each answer."""
        return [self._encode(group, answer) for answer in answers]

    def _encode(self, group: Group, answer: str) -> Tokens | None:
        turns = [*group.messages, {"role": "assistant", "content": answer}]
        ids = encode_conversation(self.tokenizer, turns, group.tools)
        return Tokens(ids, self.marks(ids)) if len(ids) <= self.longest else None

    def marks(self, ids: list[int]) -> tuple[int, ...]:
        """The tokens whose states the head reads."""
        return ()
