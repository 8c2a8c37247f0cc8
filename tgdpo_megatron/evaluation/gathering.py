"""The numbers that a comparison is made of, from models, files of answers and a reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.evaluation.comparison import AnswerNumbers, PairNumbers
from tgdpo_megatron.sampling.answers import Answered, read_answers

if TYPE_CHECKING:
    from tgdpo_megatron.data.prepare import PreparedPairs
    from tgdpo_megatron.reward_models.scorer import Scorer

PLAIN = {"temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1}
"""Sampling that draws from the model itself: only then is a mean log-ratio a KL divergence."""


def read_aligned(files: Mapping[str, Path]) -> dict[str, list[Answered]]:
    """The answers of several models to the same prompts, in the order of the first file.

    Raises:
        UserError: A file cannot be read, has a prompt twice, lacks one that another has, or has another number of
            answers to some prompts than to others.
    """
    found: dict[str, dict[str, Answered]] = {}
    for name, path in files.items():
        of_model: dict[str, Answered] = {}
        for answered in read_answers(path):
            asked = json.dumps([answered.messages, answered.tools])
            if asked in of_model:
                raise UserError(f"{path}: answers {_short(answered)} twice; leave one of them out.")
            of_model[asked] = answered
        if not of_model:
            raise UserError(f"{path}: holds no answers.")
        counts = sorted({len(answered.num_tokens) for answered in of_model.values()})
        if counts[0] < 1 or len(counts) > 1:
            raise UserError(f"{path}: has {counts[0]} answers to one prompt and {counts[-1]} to another; give as many.")
        found[name] = of_model
    first, *others = found
    for name in others:
        for lacks, has in ((name, first), (first, name)):
            if missing := [answered for asked, answered in found[has].items() if asked not in found[lacks]]:
                raise UserError(
                    f"{files[lacks]}: lacks answers to {len(missing)} prompts of {files[has]}, such as "
                    f"{_short(missing[0])}; sample them, or leave them out of both files."
                )
    return {name: [of_model[asked] for asked in found[first]] for name, of_model in found.items()}


def _short(answered: Answered) -> str:
    """A prompt, in a few words."""
    text = " ".join(str(answered.messages[-1]["content"]).split())
    return repr(text if len(text) <= 60 else f"{text[:57]}…")


def is_plain(answers: Mapping[str, Sequence[Answered]]) -> bool:
    """Whether all answers are samples of the models themselves."""
    return all(
        answered.sampling.get(name) == value for some in answers.values() for answered in some for name, value in PLAIN.items()
    )


def answer_numbers(answers: Sequence[Answered]) -> AnswerNumbers:
    """Lengths and ends of a model's answers."""
    return AnswerNumbers(
        tokens=np.array([answered.num_tokens for answered in answers], dtype=np.float64),
        characters=np.array([list(map(len, answered.all_generated_responses)) for answered in answers], dtype=np.float64),
        unfinished=np.array([[reason == "length" for reason in answered.finish_reasons] for answered in answers]),
    )


def scored(
    numbers: Mapping[str, AnswerNumbers], answers: Mapping[str, Sequence[Answered]], scorer: Scorer
) -> dict[str, AnswerNumbers]:
    """The same numbers with the scores of a reward model, which reads all models' answers to a prompt together.

    Raises:
        UserError: The reward model does not take a prompt, or gives a score that is not finite.
    """
    from tgdpo_megatron.reward_models.scorer import Group

    together = list(zip(*answers.values(), strict=True))
    groups = (
        Group(some[0].messages, [text for one in some for text in one.all_generated_responses], _short(some[0]))
        for some in together
    )
    with tqdm(desc="scoring", unit=" tokens", unit_scale=True) as bar:
        scores = np.stack(list(scorer.scores(groups, bar.update)))
    ends = np.cumsum([model.tokens.shape[1] for model in numbers.values()])[:-1]
    parts = np.split(scores, ends, axis=1)
    return {name: replace(model, scores=part) for (name, model), part in zip(numbers.items(), parts, strict=True)}


def pair_numbers(model: Any, pairs: PreparedPairs, *, name: str, batch_tokens: int) -> PairNumbers:
    """A model's log-probs of held-out pairs.

    Args:
        name: That of the model, for the progress.
    """
    from tgdpo_megatron.evaluation.log_probs import of_pairs, response_log_probs

    with tqdm(desc=f"pairs, {name}", unit=" tokens", unit_scale=True) as bar:
        found = response_log_probs(model, of_pairs(pairs), batch_tokens=batch_tokens, told=bar.update)
    _, prompts = np.unique(pairs.prompts, axis=0, return_inverse=True)
    return PairNumbers(found.reshape(-1, 2), prompts.reshape(-1))


def answer_log_probs(
    model: Any, answers: Sequence[Answered], tokenizer: Any, *, name: str, batch_tokens: int
) -> np.ndarray:
    """A model's log-probs of answers, its own or another's. [P, n] float64, nats.

    Args:
        name: That of the models, for the progress.
    """
    from tgdpo_megatron.evaluation.log_probs import of_answers, response_log_probs

    sequences = [sequence for answered in answers for sequence in of_answers(answered, tokenizer)]
    with tqdm(desc=f"answers, {name}", unit=" tokens", unit_scale=True) as bar:
        found = response_log_probs(model, sequences, batch_tokens=batch_tokens, told=bar.update)
    return found.reshape(len(answers), -1)
