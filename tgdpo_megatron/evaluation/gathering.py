"""The numbers that a comparison is made of, from models, files of answers and a reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tgdpo_megatron.errors import UserError
from tgdpo_megatron.evaluation.comparison import AnswerNumbers, PairNumbers
from tgdpo_megatron.report.words import percent, plural
from tgdpo_megatron.sampling.answers import Answered, read_answers

if TYPE_CHECKING:
    import torch

    from tgdpo_megatron.data.prepare import PreparedPairs
    from tgdpo_megatron.evaluation.log_probs import Tokenised
    from tgdpo_megatron.evaluation.models import Model
    from tgdpo_megatron.reward_models.scorer import Scorer
    from tgdpo_megatron.sampling.kept_ids import Ids

PLAIN = {"temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1}
"""Sampling that draws from the model itself: only then is a mean log-ratio a KL divergence."""
MOST_IN_OTHER_TOKENS = 0.05
"""Largest share of answers that were written in other tokens than their texts have. Of such an answer the log-ratio is
that of other tokens, of which the mean is no KL divergence: it can be negative."""


def read_aligned(files: Mapping[str, Path]) -> dict[str, list[Answered]]:
    """The answers of several models to the same prompts, in the order of the first file. None where there are no files.

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
            fewest, most = (plural(number, "answer") for number in (counts[0], counts[-1]))
            raise UserError(f"{path}: has {fewest} to one prompt and {most} to another; give as many.")
        found[name] = of_model
    first, *others = found or [""]
    for name in others:
        for lacks, has in ((name, first), (first, name)):
            if missing := [answered for asked, answered in found[has].items() if asked not in found[lacks]]:
                raise UserError(
                    f"{files[lacks]}: lacks answers to {plural(len(missing), 'prompt')} of {files[has]}, such as "
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
        answered.sampling.get(name) == value
        for some in answers.values()
        for answered in some
        for name, value in PLAIN.items()
    )


def answer_numbers(
    answers: Sequence[Answered], *, scores: np.ndarray | None = None, log_ratios: np.ndarray | None = None
) -> AnswerNumbers:
    """The numbers of a model's answers: their lengths and ends, and what else is known. Arguments as the attributes."""
    return AnswerNumbers(
        tokens=np.array([answered.num_tokens for answered in answers], dtype=np.float64),
        characters=np.array(
            [list(map(len, answered.all_generated_responses)) for answered in answers], dtype=np.float64
        ),
        unfinished=np.array([[reason == "length" for reason in answered.finish_reasons] for answered in answers]),
        scores=scores,
        log_ratios=log_ratios,
    )


def scores_of(answers: Mapping[str, Sequence[Answered]], scorer: Scorer) -> dict[str, np.ndarray]:
    """A reward model's scores of every model's answers. It reads all models' answers to a prompt together.

    Returns:
        By the names of the models; NaN for an answer that is too long for the reward model. Each [P, n] float64.

    Raises:
        UserError: The reward model does not take a prompt, or gives a score that is not finite.
    """
    from tgdpo_megatron.reward_models.scorer import Group

    together = list(zip(*answers.values(), strict=True))
    groups = (
        Group(
            some[0].messages,
            [text for one in some for text in one.all_generated_responses],
            some[0].tools,
            name=f"the prompt {_short(some[0])}",
        )
        for some in together
    )
    with tqdm(desc="scoring", unit=" tokens", unit_scale=True) as bar:
        scores = np.stack(list(scorer.scores(groups, bar.update)))
    ends = np.cumsum([len(some[0].num_tokens) for some in answers.values()])[:-1]
    return dict(zip(answers, np.split(scores, ends, axis=1), strict=True))


def with_log_probs(
    models: Sequence[Model],
    pairs: PreparedPairs | None,
    answers: Mapping[str, Sequence[Answered]],
    kept: Mapping[str, Ids],
    *,
    device: torch.device,
    batch_tokens: int,
) -> tuple[dict[str, PairNumbers], dict[str, np.ndarray], list[str]]:
    """What the models say of held-out pairs, and of their own answers. Every model is loaded once.

    Args:
        models: The start first.
        answers: By the names of the models; empty where there are none.
        kept: The token ids of the answers, as far as they are known.

    Returns:
        By the names of the models: the pairs' log-probs; log π(answer) − log π_start(answer) of every answer of a model
        beside the start, [P, n] float64 in nats. And sentences on what is left out.
    """
    from tgdpo_megatron.evaluation.log_probs import load_model, of_pairs, response_log_probs

    sequences, notes = _sequences(answers, models[0].tokenizer, kept)
    of_model: dict[str, PairNumbers] = {}
    under_start: dict[str, np.ndarray] = {}
    ratios: dict[str, np.ndarray] = {}
    for model in models:
        is_start = model is models[0]
        theirs = {name: some for name, some in sequences.items() if is_start or name == model.name}
        if pairs is None and not theirs:
            continue
        loaded = load_model(model.source.folder, device)
        with tqdm(desc=f"log-probs, {model.name}", unit=" tokens", unit_scale=True) as bar:
            if pairs is not None:
                found = response_log_probs(loaded, of_pairs(pairs), batch_tokens=batch_tokens, told=bar.update)
                of_model[model.name] = PairNumbers(found.reshape(-1, 2), prompts_of(pairs))
            for name, some in theirs.items():
                found = response_log_probs(loaded, some, batch_tokens=batch_tokens, told=bar.update)
                if is_start:
                    under_start[name] = found
                else:
                    ratios[name] = (found - under_start[name]).reshape(len(answers[name]), -1)
        del loaded  # before the next one is
    return of_model, ratios, notes


def _sequences(
    answers: Mapping[str, Sequence[Answered]], tokenizer: Any, kept: Mapping[str, Ids]
) -> tuple[dict[str, list[Tokenised]], list[str]]:
    """The models' answers as token ids where a KL divergence can be made of them; and sentences on what it lacks."""
    from tgdpo_megatron.evaluation.log_probs import of_answers

    if not is_plain(answers):
        return {}, ["No KL divergence: it needs answers sampled at temperature 1 from all tokens."]
    found: dict[str, list[Tokenised]] = {}
    notes = []
    for name, some in list(answers.items())[1:]:
        sequences = of_answers(some, tokenizer, kept[name])
        sampled = [tokens for answered in some for tokens in answered.num_tokens]
        other = np.mean([len(one.ids) - one.prompt != tokens for one, tokens in zip(sequences, sampled, strict=True)])
        words = f"{percent(float(other))} of the answers of {name} were written in other tokens than their texts have"
        if other > MOST_IN_OTHER_TOKENS:
            notes.append(f"No KL divergence of {name}: {words}; tools.sample keeps the tokens with --keep-ids.")
            continue
        if other:
            notes.append(f"{words}, which the KL divergence is made of.")
        found[name] = sequences
    return found, notes


def prompts_of(pairs: PreparedPairs) -> np.ndarray:
    """Which prompt each pair belongs to, counted from 0. [pairs] int64"""
    return np.unique(pairs.prompts, axis=0, return_inverse=True)[1].reshape(-1)
