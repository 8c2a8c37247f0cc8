"""What is compared of models, from numbers of their answers and of held-out pairs to estimates with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tgdpo_megatron.evaluation.bootstrap import Measure, Measured, mean, measured, ratio
from tgdpo_megatron.evaluation.win_rates import hard_wins, length_controlled, soft_wins
from tgdpo_megatron.report.words import number, percent

SEED = 0
"""Of the bootstrap's draws."""


@dataclass(frozen=True)
class PairNumbers:
    """What a model says of held-out pairs.

    Attributes:
        log_probs: Of the chosen and of the rejected response. [pairs, 2] float64, nats.
        prompts: Which prompt a pair belongs to, counted from 0. [pairs] int64.
    """

    log_probs: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True)
class AnswerNumbers:
    """What is known of a model's answers: n to each of P prompts.

    Attributes:
        tokens: Length, the token that closes the turn included. [P, n] float64.
        characters: Length of the text. [P, n] float64.
        unfinished: Whether there was no room for more. [P, n] bool.
        scores: The reward model's, NaN where it does not read an answer. [P, n] float64; None without one.
        start_scores: Those of the start's answers that these are compared with, where a reward model's scores depend on
            what is scored together. [P, m] float64; None where they are the start's own `scores`.
        log_ratios: log π(answer) − log π_start(answer), in nats. [P, n] float64; None where the answers are no plain
            samples, so that their mean is no KL divergence.
    """

    tokens: np.ndarray
    characters: np.ndarray
    unfinished: np.ndarray
    scores: np.ndarray | None = None
    start_scores: np.ndarray | None = None
    log_ratios: np.ndarray | None = None


def _share(value: float) -> str:
    return percent(value).replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Quantity:
    """One line of the table.

    Attributes:
        heading: What the table calls it.
        meaning: A sentence, for the page.
        written: How a value is written.
    """

    heading: str
    meaning: str
    written: Callable[[float], str]


QUANTITIES = {
    "accuracy_logp": Quantity(
        "preference accuracy, log-prob",
        "Share of held-out pairs whose chosen response is likelier than the rejected one; equal ones count half.",
        _share,
    ),
    "accuracy_reward": Quantity(
        "preference accuracy, implicit reward",
        "Share of held-out pairs whose chosen response has gained more log-prob over the start than the rejected one.",
        _share,
    ),
    "win_rate": Quantity(
        "win rate",
        "How often the reward model scores the model's answer above the start's; equal scores count half.",
        _share,
    ),
    "win_rate_soft": Quantity(
        "win rate, soft",
        "The mean of σ(score − the start's score): the reward model's own probability of a preference.",
        _share,
    ),
    "win_rate_length_controlled": Quantity(
        "win rate, length-controlled (minimal form)",
        "σ(θ) of a logistic regression of wins on θ + φ·tanh(Δlength / its standard deviation): the win rate that the "
        "regression expects where both answers are equally long.",
        _share,
    ),
    "win_rate_soft_length_controlled": Quantity(
        "win rate, soft, length-controlled (minimal form)",
        "The soft win rate that a logistic regression expects where both answers are equally long: σ(θ), with the "
        "probabilities of a preference explained by θ + φ·tanh(Δlength / its standard deviation).",
        _share,
    ),
    "reward": Quantity("mean reward", "The mean score; its scale is the reward model's own.", number),
    "tokens": Quantity("tokens per answer", "The mean length of an answer.", number),
    "length_ratio": Quantity("length, as a multiple of the start's", "The ratio of the mean lengths.", number),
    "unfinished": Quantity("unfinished answers", "Share of answers that had no room to end.", _share),
    "kl": Quantity(
        "KL to the start, nats per answer",
        "The mean over the model's own answers of log π(answer) − log π_start(answer).",
        number,
    ),
    "kl_per_token": Quantity("KL to the start, nats per token", "The same, divided by the mean length.", number),
}
"""Name of what is measured -> how it is shown. The order is that of the table."""


def pair_measures(model: PairNumbers, start: PairNumbers | None) -> dict[str, Measure]:
    """Measures of one model on pairs, by their names in QUANTITIES. Prompts are drawn, with all their pairs.

    Args:
        start: What the start says of the same pairs; None for the start itself, which has no reward.
    """
    prompts = int(model.prompts.max()) + 1
    found = {"accuracy_logp": model.log_probs}
    if start is not None:
        found["accuracy_reward"] = model.log_probs - start.log_probs
    pairs = np.bincount(model.prompts, minlength=prompts).astype(np.float64)
    return {
        name: ratio(np.bincount(model.prompts, weights=_right(values), minlength=prompts), pairs)
        for name, values in found.items()
    }


def _right(values: np.ndarray) -> np.ndarray:
    """1 where the first of two numbers is larger, 1/2 where they are equal. [N, 2] -> [N]"""
    return (np.sign(values[:, 0] - values[:, 1]) + 1) / 2


def answer_measures(model: AnswerNumbers, start: AnswerNumbers | None) -> dict[str, Measure]:
    """Measures of one model's answers on all prompts, by their names in QUANTITIES.

    Args:
        start: The start's answers to the same prompts; None for the start itself.
    """
    tokens = model.tokens.mean(axis=1)
    found = {"tokens": mean(tokens), "unfinished": mean(model.unfinished.mean(axis=1))}
    if start is None:
        return found
    found["length_ratio"] = ratio(tokens, start.tokens.mean(axis=1))
    if model.log_ratios is not None:
        log_ratios = model.log_ratios.mean(axis=1)
        found |= {"kl": mean(log_ratios), "kl_per_token": ratio(log_ratios, tokens)}
    return found


def score_measures(
    model: AnswerNumbers, start: AnswerNumbers | None, *, scored: np.ndarray, is_bradley_terry: bool
) -> dict[str, Measure]:
    """Measures of the scores of one model's answers, by their names in QUANTITIES; none where there are no scores.

    Args:
        start: As for answer_measures.
        scored: The prompts to measure on, all of whose answers have a score. [P] bool.
        is_bradley_terry: Whether σ of a difference of scores is a probability.
    """
    if model.scores is None:
        return {}
    found = {"reward": mean(model.scores[scored].mean(axis=1))}
    if start is None:
        return found
    theirs = start.scores if model.start_scores is None else model.start_scores
    assert theirs is not None
    wins, soft = hard_wins(model.scores[scored], theirs[scored]), soft_wins(model.scores[scored], theirs[scored])
    longer = model.characters[scored][:, :, None] - start.characters[scored][:, None, :]
    found["win_rate"] = mean(wins.mean(axis=(1, 2)))
    if is_bradley_terry:
        found["win_rate_soft"] = mean(soft.mean(axis=(1, 2)))
        found["win_rate_soft_length_controlled"] = length_controlled(soft, longer)
    else:
        found["win_rate_length_controlled"] = length_controlled(wins, longer)
    return found


@dataclass(frozen=True)
class Comparison:
    """What was measured of every model, the start first.

    Attributes:
        models: Name of a model -> name of a quantity -> what was measured.
    """

    models: dict[str, dict[str, Measured]]

    @property
    def quantities(self) -> list[str]:
        """What was measured of any model, in the order of QUANTITIES."""
        return [name for name in QUANTITIES if any(name in found for found in self.models.values())]

    @property
    def differences(self) -> dict[tuple[str, str], dict[str, Measured]]:
        """(one model, another before it) -> what differs between them, and by how much. The start is left out."""
        names = list(self.models)[1:]
        return {
            (later, earlier): {
                name: found - self.models[earlier][name]
                for name, found in self.models[later].items()
                if name in self.models[earlier]
            }
            for place, later in enumerate(names)
            for earlier in names[:place]
        }


def compared(
    pairs: Mapping[str, PairNumbers], answers: Mapping[str, AnswerNumbers], *, is_bradley_terry: bool
) -> Comparison:
    """Measure everything that can be measured.

    Args:
        pairs, answers: By the names of the models, the start's first; empty where there are none.
    """
    found: dict[str, dict[str, Measured]] = {name: {} for name in (pairs or answers)}
    if pairs:
        start, first = next(iter(pairs.items()))
        measures = {name: pair_measures(model, None if name == start else first) for name, model in pairs.items()}
        _add(found, measures, int(first.prompts.max()) + 1)
    if answers:
        start, theirs = next(iter(answers.items()))
        against = {name: None if name == start else theirs for name in answers}
        measures = {name: answer_measures(model, against[name]) for name, model in answers.items()}
        _add(found, measures, len(theirs.tokens))
        scored = with_scores(answers)
        if scored.any():
            # Drawn among the prompts that have scores: a draw among all could hold none of these.
            measures = {
                name: score_measures(model, against[name], scored=scored, is_bradley_terry=is_bradley_terry)
                for name, model in answers.items()
            }
            _add(found, measures, int(scored.sum()))
    return Comparison(found)


def with_scores(answers: Mapping[str, AnswerNumbers]) -> np.ndarray:
    """Whether all answers to a prompt have a score, whichever model they are of. [P] bool"""
    all_scores = [scores for model in answers.values() for scores in (model.scores, model.start_scores)]
    finite = [np.isfinite(scores).all(axis=1) for scores in all_scores if scores is not None]
    return np.all(finite, axis=0) if finite else np.full(len(next(iter(answers.values())).tokens), False)


def _add(found: dict[str, dict[str, Measured]], measures: Mapping[str, Mapping[str, Measure]], prompts: int) -> None:
    """Measure everything on the same draws."""
    together = {(model, name): measure for model, some in measures.items() for name, measure in some.items()}
    for (model, name), value in measured(together, prompts, seed=SEED).items():
        found[model][name] = value


# ---------------------------------------------------------------- for people and programs


def rows(comparison: Comparison) -> list[list[str]]:
    """The table: a heading, then a row for each quantity with a cell for each model."""
    return _table(comparison, comparison.models)


def rows_of_differences(comparison: Comparison) -> list[list[str]]:
    """The table of differences between models; empty where there is one model beside the start."""
    named = {f"{later} \N{MINUS SIGN} {earlier}": found for (later, earlier), found in comparison.differences.items()}
    return _table(comparison, named) if named else []


def _table(comparison: Comparison, columns: Mapping[str, Mapping[str, Measured]]) -> list[list[str]]:
    found = [["", *columns]]
    for name in comparison.quantities:
        cells = [_cell(name, column.get(name)) for column in columns.values()]
        if any(cell != "–" for cell in cells):
            found.append([QUANTITIES[name].heading, *cells])
    return found


def _cell(name: str, value: Measured | None) -> str:
    if value is None:
        return "–"
    written, (low, high) = QUANTITIES[name].written, value.interval
    return f"{written(value.value)} [{written(low)}, {written(high)}]"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """`models` and `differences`: for every quantity `value`, `low` and `high`; null for what is no number."""
    differences = [
        {"model": later, "less": earlier, **_numbers(found)}
        for (later, earlier), found in comparison.differences.items()
    ]
    return {
        "models": {name: _numbers(found) for name, found in comparison.models.items()},
        "differences": differences,
    }


def _numbers(found: Mapping[str, Measured]) -> dict[str, Any]:
    return {name: _estimate([value.value, *value.interval]) for name, value in found.items()}


def _estimate(numbers: Sequence[float]) -> dict[str, float | None]:
    known = [value if math.isfinite(value) else None for value in numbers]
    return dict(zip(("value", "low", "high"), known, strict=True))
