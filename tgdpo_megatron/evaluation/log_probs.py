"""Log-probs of whole responses under a HuggingFace model, in batches without a trace of their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.tokenizer import encode_prompt, end_of_turn, special_ids
from tgdpo_megatron.reward_models.loading import load_weights
from tgdpo_megatron.reward_models.scorer import Tokens, batches, padded
from tgdpo_megatron.sampling.answers import Answered
from tgdpo_megatron.sampling.engine import prompt_id, said
from tgdpo_megatron.sampling.kept_ids import Ids


@dataclass(frozen=True)
class Tokenised:
    """A prompt with a response, as token ids. The prompt has at least one token, the response any number."""

    ids: list[int]
    prompt: int


def of_pairs(pairs: PreparedPairs) -> list[Tokenised]:
    """Both responses of every pair, the chosen one first, as training reads them."""
    prompts = pairs.prompt_lengths.tolist()
    return [
        Tokenised(pairs.sequence(pair, side).tolist(), prompts[pair]) for pair in range(len(pairs)) for side in (0, 1)
    ]


def of_answers(answers: Iterable[Answered], tokenizer: Any, kept: Ids) -> list[Tokenised] | None:
    """All answers to all prompts as the model wrote them: with the token that closes the turn, unless unfinished.

    Args:
        kept: The ids of the answers, as far as they are known. The texts of the others are tokenised again.

    Returns:
        None where a prompt has other tokens than the one that was answered.
    """
    closing, special, found = end_of_turn(tokenizer), special_ids(tokenizer), []
    for answered in answers:
        _, prompt = encode_prompt(tokenizer, answered.messages, answered.tools)
        if prompt_id(prompt) != answered.prompt_id:
            return None
        for sample, text in enumerate(answered.all_generated_responses):
            ids = kept.get((answered.prompt_id, sample))
            if ids is None or said(tokenizer, ids, special) != text:
                end = [closing] if answered.finish_reasons[sample] == "stop" else []
                ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]
            found.append(Tokenised([*prompt, *ids], len(prompt)))
    return found


def load_model(folder: Path, device: torch.device) -> Any:
    """A model to score with: in fp32 on a CPU, on a GPU in the dtype in which it is stored.

    Raises:
        UserError: The weights are damaged, or are not those of a language model.
    """
    model = load_weights(AutoModelForCausalLM, folder, device)
    return model.float() if device.type == "cpu" else model


@torch.inference_mode()
def response_log_probs(
    model: Any,
    sequences: Sequence[Tokenised],
    *,
    batch_tokens: int,
    told: Callable[[int], object] = lambda tokens: None,
) -> np.ndarray:
    """log π(response | prompt) of every sequence, in nats: the sum over the response's tokens. [N] float64

    Args:
        batch_tokens: Most tokens that go through the model together, padding included.
        told: Called after each batch with its number of tokens, without padding.
    """
    found = np.zeros(len(sequences))
    for places in batches([len(sequence.ids) for sequence in sequences], batch_tokens):
        batch = [sequences[place] for place in places]
        # A token attends only to those before it, so padding on the right changes nothing.
        ids, mask = padded([Tokens(sequence.ids) for sequence in batch], 0, model.device)
        first = min(sequence.prompt for sequence in batch) - 1  # the first position that predicts a response
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            logits_to_keep=ids.size(1) - first,
            use_cache=False,
        ).logits
        for row, sequence in enumerate(batch):
            length = len(sequence.ids)
            predicted = logits[row, sequence.prompt - 1 - first : length - 1 - first].float()
            labels = ids[row, sequence.prompt : length]
            found[places[row]] = -float(cross_entropy(predicted, labels, reduction="none").double().sum())
        told(sum(len(sequence.ids) for sequence in batch))
    return found
