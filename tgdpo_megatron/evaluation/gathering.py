"""The numbers that a comparison is made of, from models, files of answers and a reward model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from tgdpo_megatron.commands import as_called
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.evaluation.comparison import AnswerNumbers, PairNumbers
from tgdpo_megatron.report.words import percent, plural
from tgdpo_megatron.sampling.answers import Answered, read_answers

if TYPE_CHECKING:
    import torch

    from tgdpo_megatron.data.prepare import PreparedPairs
    from tgdpo_megatron.evaluation.log_probs import Tokenised
    from tgdpo_megatron.evaluation.models import Model
    from tgdpo_megatron.reward_models.scorer import Group, Scorer
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
            asked = _asked(answered)
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


def _asked(prompt: Answered | Group) -> str:
    """The same for the same prompt."""
    return json.dumps([prompt.messages, prompt.tools])


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
    answers: Sequence[Answered],
    *,
    scores: np.ndarray | None = None,
    start_scores: np.ndarray | None = None,
    log_ratios: np.ndarray | None = None,
) -> AnswerNumbers:
    """The numbers of a model's answers: their lengths and ends, and what else is known. Arguments as the attributes."""
    return AnswerNumbers(
        tokens=np.array([answered.num_tokens for answered in answers], dtype=np.float64),
        characters=np.array(
            [list(map(len, answered.all_generated_responses)) for answered in answers], dtype=np.float64
        ),
        unfinished=np.array([[reason == "length" for reason in answered.finish_reasons] for answered in answers]),
        scores=scores,
        start_scores=start_scores,
        log_ratios=log_ratios,
    )


Scores = dict[str, np.ndarray]
"""Name of a model -> a score of each answer, NaN where the reward model does not read it. [P, n] float64."""


def scores_of(answers: Mapping[str, Sequence[Answered]], scorer: Scorer) -> tuple[Scores, Scores, int]:
    """A reward model's scores of every model's answers, the start's first, and of the start's that they are read with.

    PairRM's scores depend on what is scored together, so it reads the answers of every model with those of the start
    alone: else the win rate of two models would change with a third. The start then has no scores of its own.

    Returns:
        AnswerNumbers.scores and AnswerNumbers.start_scores, of the models that have them; and the number of prompts
        that the reward model does not take, with an answer to each. No model's answers to these have a score.

    Raises:
        UserError: The reward model gives a score that is not finite.
    """
    from tgdpo_megatron.reward_models.pairrm import PairRM

    refused: set[str] = set()
    with tqdm(desc="scoring", unit=" tokens", unit_scale=True) as bar:
        if not isinstance(scorer.model, PairRM):
            return _scored_together(answers, scorer, bar.update, refused), {}, len(refused)
        scores, start_scores = Scores(), Scores()
        start, *others = answers
        for name in others:
            found = _scored_together({start: answers[start], name: answers[name]}, scorer, bar.update, refused)
            start_scores[name], scores[name] = found[start], found[name]
        return scores, start_scores, len(refused)


def _scored_together(
    answers: Mapping[str, Sequence[Answered]], scorer: Scorer, told: Callable[[int], object], refused: set[str]
) -> Scores:
    """Scores of some models' answers, for which the reward model reads all answers to a prompt together.

    Args:
        refused: Gets the prompts that the reward model does not take.
    """
    from tgdpo_megatron.reward_models.scorer import Group

    groups = (
        Group(
            some[0].messages,
            [text for one in some for text in one.all_generated_responses],
            some[0].tools,
            name=f"the prompt {_short(some[0])}",
        )
        for some in zip(*answers.values(), strict=True)
    )
    scores = np.stack(list(scorer.scores(groups, told, lambda group: refused.add(_asked(group)))))
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
        answers: Those to make a KL divergence of, by the names of the models; empty where there are none.
        kept: The token ids of the answers, as far as they are known.

    Returns:
        By the names of the models: the pairs' log-probs; log π(answer) − log π_start(answer) of every answer of a model
        beside the start, [P, n] float64 in nats. And sentences on what is left out.
    """
    from tgdpo_megatron.evaluation.log_probs import load_model, of_pairs, response_log_probs

    sequences, notes = _sequences(models, answers, kept)
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
    models: Sequence[Model], answers: Mapping[str, Sequence[Answered]], kept: Mapping[str, Ids]
) -> tuple[dict[str, list[Tokenised]], list[str]]:
    """The models' answers as token ids where a KL divergence can be made of them; and sentences on what it lacks."""
    from tgdpo_megatron.evaluation.log_probs import of_answers
    from tgdpo_megatron.evaluation.models import other_tokens

    if not is_plain(answers):
        return {}, ["No KL divergence: it needs answers sampled at temperature 1 from all tokens."]
    found: dict[str, list[Tokenised]] = {}
    notes = []
    start, *others = models if answers else models[:1]
    for model in others:
        name, some = model.name, answers[model.name]
        if difference := other_tokens(model, start):
            notes.append(f"No KL divergence of {name}: it {difference}.")
            continue
        sequences = of_answers(some, start.tokenizer, kept[name])
        if sequences is None:
            notes.append(
                f"No KL divergence of {name}: the chat template makes other tokens of the prompts than those that were "
                "answered; give it as it was, with data.template and data.chat_template_kwargs."
            )
            continue
        sampled = [tokens for answered in some for tokens in answered.num_tokens]
        other = np.mean([len(one.ids) - one.prompt != tokens for one, tokens in zip(sequences, sampled, strict=True)])
        words = f"{percent(float(other))} of the answers of {name} were written in other tokens than their texts have"
        if other > MOST_IN_OTHER_TOKENS:
            remedy = as_called("tools.sample keeps the tokens with --keep-ids")
            notes.append(f"No KL divergence of {name}: {words}; {remedy}.")
            continue
        if other:
            notes.append(f"{words}, which the KL divergence is made of.")
        found[name] = sequences
    return found, notes


def prompts_of(pairs: PreparedPairs) -> np.ndarray:
    """Which prompt each pair belongs to, counted from 0. [pairs] int64"""
    return np.unique(pairs.prompts, axis=0, return_inverse=True)[1].reshape(-1)
