"""Scores of answers: sequences of about equal lengths go through the reward model together.

What the kinds of reward models differ in is a :class:`RewardModel`: which token ids it reads of a prompt and its
answers, the number that it makes of each sequence, and the scores that follow from the numbers. Everything about
batches is here, once. Padding stands to the right of a sequence and is masked, so that it changes no number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tgdpo_megatron.data.rendering import TemplateRefusal
from tgdpo_megatron.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BATCH_TOKENS = 16384
"""Tokens of a batch, padding included, where nothing else is asked for. A longer sequence goes alone."""
WINDOW = 32
"""Batches' worth of tokens that are sorted by length together: enough that neighbours are about equally long, and few
enough that no file is held in memory."""


@dataclass(frozen=True)
class Group:
    """A prompt with answers that are compared.

    Attributes:
        messages: The turns before the answers, as chat templates take them.
        answers: Texts of the assistant's next turn.
        tools: What the model may call, as JSON schemas.
        name: What error messages call the prompt.
    """

    messages: Sequence[Mapping[str, Any]]
    answers: Sequence[str]
    tools: Sequence[Mapping[str, Any]] = ()
    name: str = "a prompt"


@dataclass(frozen=True)
class Tokens:
    """A sequence that a reward model reads.

    Attributes:
        ids: Token ids.
        marks: Places of the tokens whose hidden states the model's head reads, for a head of our own.
    """

    ids: list[int]
    marks: tuple[int, ...] = ()


class RewardModel(ABC):
    """One kind of reward model.

    Attributes:
        is_bradley_terry: Whether σ of a difference of scores is the probability that one answer is preferred.
        device: Where the weights are.
        vocabulary: Number of token ids that the model has.
    """

    is_bradley_terry = False
    device: torch.device
    vocabulary: int

    @abstractmethod
    def encode(self, group: Group, answers: Sequence[str]) -> Sequence[Any]:
        """What is read of each of some different answers to a prompt; None for one that is too long for the model.

        Raises:
            TemplateRefusal: The model does not take such turns.
        """

    def sequences(self, encoded: Sequence[Any]) -> list[Tokens]:
        """The sequences to read for the answers of one prompt: by default one for each answer."""
        return list(encoded)

    @abstractmethod
    def numbers(self, sequences: Sequence[Tokens]) -> Tensor:
        """A number for each sequence of a batch. [B] float."""

    def scores(self, numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The scores of the different answers to one prompt: by default the numbers themselves.

        Args:
            numbers: Those of the prompt's sequences. float64.
            counts: How many of the prompt's answers have each text. [A] int64.

        Returns:
            [A] float64.
        """
        return numbers


@dataclass(frozen=True)
class _Asked:
    """A group, and what has to be read for it: of each text once, so that the same text has the same score."""

    group: Group
    texts: list[str]
    sequences: list[Tokens]


class Scorer:
    """A reward model that is ready to score.

    Attributes:
        name: As the user gave it.
        fingerprint: Hash of all files that its scores depend on.
        tokens, padded: Tokens read so far, without padding and with it.
    """

    def __init__(self, model: RewardModel, *, name: str, fingerprint: str, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model, self.name, self.fingerprint, self.batch_tokens = model, name, fingerprint, batch_tokens
        self.tokens = self.padded = 0

    @property
    def is_bradley_terry(self) -> bool:
        """Whether σ of a difference of scores is the probability that one answer is preferred."""
        return self.model.is_bradley_terry

    def scores(
        self,
        groups: Iterable[Group],
        told: Callable[[int], object] = lambda tokens: None,
        refused: Callable[[Group], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """The scores of each group's answers, in order. Groups are taken and given some at a time.

        Args:
            told: Called after each batch with its number of tokens, without padding.
            refused: Called with a group whose turns the model does not take, before its scores, which are NaN then.
                Without it, such a group is an error.

        Yields:
            A score for each answer, NaN for one that is too long for the model. [A] float64.

        Raises:
            UserError: The model does not take a group's turns, where that is an error, or a score is not finite.
        """
        window: list[_Asked] = []
        tokens = 0
        for group in groups:
            window.append(self._asked(group, refused))
            tokens += sum(len(sequence.ids) for sequence in window[-1].sequences)
            if tokens >= WINDOW * self.batch_tokens:
                yield from self._of_window(window, told)
                window, tokens = [], 0
        yield from self._of_window(window, told)

    def _asked(self, group: Group, refused: Callable[[Group], object] | None) -> _Asked:
        texts = list(dict.fromkeys(group.answers))
        try:
            encoded = self.model.encode(group, texts)
        except UserError as error:
            if refused is None or not isinstance(error, TemplateRefusal):
                raise UserError(f"{group.name}: {error}") from error
            refused(group)
            return _Asked(group, [], [])
        fitting = {text: found for text, found in zip(texts, encoded, strict=True) if found is not None}
        sequences = self.model.sequences(list(fitting.values()))
        if any(max(sequence.ids) >= self.model.vocabulary for sequence in sequences):
            raise UserError(
                f"{group.name}: the tokenizer of {self.name} gives ids that its model, with {self.model.vocabulary} "
                "of them, does not have; save the tokenizer that belongs to it beside the weights."
            )
        return _Asked(group, list(fitting), sequences)

    def _of_window(self, window: Sequence[_Asked], told: Callable[[int], object]) -> Iterator[np.ndarray]:
        numbers = self._numbers([sequence for asked in window for sequence in asked.sequences], told)
        start = 0
        for asked in window:
            end = start + len(asked.sequences)
            yield self._of_group(asked, numbers[start:end])
            start = end

    def _numbers(self, sequences: Sequence[Tokens], told: Callable[[int], object]) -> np.ndarray:
        """The model's number for each sequence. float64."""
        import torch

        numbers = np.empty(len(sequences))
        for places in batches([len(sequence.ids) for sequence in sequences], self.batch_tokens):
            batch = [sequences[place] for place in places]
            with torch.inference_mode():
                numbers[places] = self.model.numbers(batch).double().cpu().numpy()
            read = sum(len(sequence.ids) for sequence in batch)
            self.tokens += read
            self.padded += len(batch) * max(len(sequence.ids) for sequence in batch)
            told(read)
        return numbers

    def _of_group(self, asked: _Asked, numbers: np.ndarray) -> np.ndarray:
        counts = Counter(asked.group.answers)
        scores = self.model.scores(numbers, np.array([counts[text] for text in asked.texts], dtype=np.int64))
        strange = scores[~np.isfinite(scores)]
        if strange.size:
            raise UserError(
                f"{asked.group.name}: {self.name} gives an answer the score {strange[0]}, which is not finite; use "
                "another reward model, or weights of it in a wider dtype."
            )
        of_text = dict(zip(asked.texts, scores.tolist(), strict=True))
        return np.array([of_text.get(answer, np.nan) for answer in asked.group.answers])


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of sequences that go together, the longest first, so that memory which does not suffice shows at once.

    Args:
        budget: Most tokens of a batch, padding included. A longer sequence goes alone.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(order):
        rows = max(1, budget // lengths[order[start]])
        yield order[start : start + rows]
        start += rows


def padded(sequences: Sequence[Tokens], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and which of them are no padding. Both [B, T] int64."""
    import torch

    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[row, : len(sequence.ids)] = 1
    return ids.to(device), mask.to(device)


def states_at(states: Tensor, sequences: Sequence[Tokens]) -> Tensor:
    """The hidden states of the marked tokens, in fp32. [B, T, h] -> [B, marks, h]."""
    import torch

    marks = torch.tensor([sequence.marks for sequence in sequences], device=states.device)
    return states.gather(1, marks[:, :, None].expand(-1, -1, states.shape[-1])).float()
