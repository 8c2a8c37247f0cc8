"""Answers by transformers, on the first GPU or the CPU: left-padded batches with a cache of keys and values.

transformers' own `generate` fills what is not said from generation_config.json and from defaults of its own (top_k=50
among them), and draws from one stream of random numbers for a whole batch. Here everything that changes an answer
stands in `_batch`: the prompt, the settings, and noise of its own for every answer. So the neighbours in a batch change
an answer by rounding alone, and the same batches give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tgdpo_megatron.checkpoint.hf_models import device_of, load_model
from tgdpo_megatron.checkpoint.sources import Source, content_hash
from tgdpo_megatron.data.tokenizer import special_ids
from tgdpo_megatron.errors import UserError, in_short, ran_out_of_memory
from tgdpo_megatron.sampling.engine import (
    Answer,
    EngineName,
    Request,
    Sampling,
    end_ids,
    max_length_of,
    nobody,
    room_for,
    said,
)

_BLOCK = 2
"""Prompts of a block, for each answer of a batch. More of them pad less, and a killed run loses more."""
_DROPPED_FROM = 0.25
"""Share of finished answers in a batch from which they are dropped: each time, the cache is copied."""


class TransformersEngine:
    """A model in this process. Attributes as Engine's.

    Args:
        source: A HuggingFace folder.
        batch_size: Answers that are computed at once.
        device: Default: the first GPU, or the CPU where there is none.

    Raises:
        UserError: There is no such device, or the model cannot be loaded.
    """

    name: EngineName = "transformers"

    def __init__(self, source: Source, tokenizer: Any, *, batch_size: int = 32, device: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.model = {"name": str(source.given), "fingerprint": content_hash(source.folder)}
        self.max_length = max_length_of(source)
        self.block = _BLOCK * batch_size
        self._batch_size = batch_size
        self._given = source.given
        self._device = device_of(device)
        self._ends, self._special = set(end_ids(source, tokenizer)), special_ids(tokenizer)
        self._model = _load(source, self._device)

    def answers(self, requests: Iterable[Request], told: Callable[[int], object] = nobody) -> Iterator[Answer]:
        """As Engine.answers."""
        prompts = (list(same) for _, same in groupby(requests, key=lambda request: request.ids))
        while some := list(chain.from_iterable(islice(prompts, self.block))):
            yield from self._together(some, told)

    def _together(self, requests: Sequence[Request], told: Callable[[int], object]) -> list[Answer]:
        """Answers to some requests, in their order. Those of equal settings and of nearly the same length share a
        batch."""
        answers: dict[int, Answer] = {}

        def settings(place: int) -> tuple[Any, ...]:
            return astuple(requests[place].settings)

        places = sorted(range(len(requests)), key=lambda place: (settings(place), len(requests[place].ids)))
        for _, same in groupby(places, key=settings):
            while batch := list(islice(same, self._batch_size)):
                try:
                    found = self._batch([requests[place] for place in batch], told)
                except Exception as error:
                    if not ran_out_of_memory(error):
                        raise
                    raise UserError(
                        f"memory ran out with {len(batch)} answers at once ({in_short(error)}); lower --batch-size."
                    ) from error
                answers |= zip(batch, found, strict=True)
        return [answers[place] for place in range(len(requests))]

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request], told: Callable[[int], object]) -> list[Answer]:
        """Answers to requests of equal settings, token by token."""
        rooms = [room_for(request, self.max_length) for request in requests]
        settings = requests[0].settings
        filters, noise = _filters(settings), torch.from_numpy(_noise(requests, max(rooms))).to(self._device)
        answers: list[list[int]] = [[] for _ in requests]
        # Rows of the batch, from here on: which requests they are for, and whether these are answered.
        of_rows, done = list(range(len(requests))), [False] * len(requests)
        seen, mask = (part.to(self._device) for part in _left_padded([request.ids for request in requests]))
        new, positions = seen, (mask.cumsum(dim=-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        for step in range(max(rooms)):
            logits = self._model(
                input_ids=new,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            drawn = _draw(filters(seen, logits.float()), noise[of_rows, step] if settings.temperature else None)
            self._check(drawn)
            told(done.count(False))
            for row, token in enumerate(drawn.tolist()):
                if not done[row]:
                    answer = answers[of_rows[row]]
                    answer.append(token)
                    done[row] = token in self._ends or len(answer) == rooms[of_rows[row]]
            if all(done):
                break
            new, positions = drawn[:, None], positions[:, -1:] + 1
            seen, mask = torch.cat([seen, new], dim=-1), torch.cat([mask, torch.ones_like(new)], dim=-1)
            if done.count(True) >= _DROPPED_FROM * len(done):
                kept = torch.tensor([row for row, is_done in enumerate(done) if not is_done], device=self._device)
                cache.batch_select_indices(kept)
                new, positions, seen, mask = (part[kept] for part in (new, positions, seen, mask))
                of_rows, done = [of_rows[row] for row in kept.tolist()], [False] * len(kept)
        return [self._answer(ids) for ids in answers]

    def _check(self, drawn: Tensor) -> None:
        if bool((drawn < 0).any()):
            raise UserError(f"{self._given}: the model's logits are not numbers; its weights are damaged.")

    def _answer(self, ids: Sequence[int]) -> Answer:
        text = said(self.tokenizer, ids, self._special)
        return Answer(text, tuple(ids), len(ids), "stop" if ids[-1] in self._ends else "length")


def _load(source: Source, device: torch.device) -> Any:
    """The model.

    Raises:
        UserError: As load_model.
    """
    try:
        return load_model(AutoModelForCausalLM, source.folder, device, leftover=True)
    except UserError as error:
        raise source.refusal(str(error)) from error


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids of prompts that all end in the last column, and 1 where an id is one of the prompt's. Both [rows, longest].

    A row is padded with its own first id: attention does not see it, and a repetition penalty, which looks at all ids,
    finds no token that is not in the prompt.
    """
    longest = max(map(len, prompts))
    ids = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _filters(settings: Sampling) -> LogitsProcessorList:
    """What is done to logits before a token is drawn, in the order in which `generate` and vLLM do it."""
    filters = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        filters.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
    if settings.temperature not in (0, 1):
        filters.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.temperature and settings.top_k:
        filters.append(TopKLogitsWarper(settings.top_k))
    if settings.temperature and settings.top_p < 1:
        filters.append(TopPLogitsWarper(float(settings.top_p)))
    return filters


def _noise(requests: Sequence[Request], steps: int) -> np.ndarray:
    """A uniform random number from [0, 1) for each step of each answer, by Philox's counter. [rows, steps] float64"""
    return np.stack([np.random.Generator(np.random.Philox(key=request.own_seed)).random(steps) for request in requests])


def _draw(logits: Tensor, uniforms: Tensor | None) -> Tensor:
    """The token at which the cumulative probability exceeds a uniform number; the likeliest where there is none.

    Args:
        logits: [rows, vocabulary] fp32; -inf for tokens that are not to be drawn.
        uniforms: [rows] float64

    Returns:
        Token ids; -1 for a row whose logits are not numbers. [rows]
    """
    if uniforms is None:
        highest, tokens = logits.max(dim=-1)
        return tokens.where(highest.isfinite(), -1)
    # In float64: in fp32 the sum over a large vocabulary would round away what rare tokens add.
    sums = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    tokens = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)[:, 0]
    return tokens.where(sums[:, -1].isfinite(), -1)
