"""How often a scorer prefers a model's answers to those of the model it is compared with."""

from __future__ import annotations

import numpy as np

from tgdpo_megatron.evaluation.bootstrap import Measure

RIDGE = 0.01
"""Weight of the squared coefficients in the length-controlled fit. Without it, a model that wins every time would have
an infinite one."""
_STEPS, _SMALL = 100, 1e-10
"""Most steps of Newton's method, and the step that ends it."""
_BLOCK = 1 << 20
"""Most numbers of one block of fits."""


def hard_wins(model: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where an answer of the model scores higher than one of the other, 1/2 where equal, 0 where lower.

    Args:
        model, other: Scores of the answers to each prompt. [P, n], [P, m] float64.

    Returns:
        Every answer of one against every answer of the other. [P, n, m] float64.
    """
    return (np.sign(model[:, :, None] - other[:, None, :]) + 1) / 2


def soft_wins(model: np.ndarray, other: np.ndarray) -> np.ndarray:
    """σ of the difference of scores: the probability of a preference under a scorer of Bradley and Terry's kind.

    Arguments and result are those of hard_wins.
    """
    return sigmoid(model[:, :, None] - other[:, None, :])


def length_controlled(wins: np.ndarray, longer: np.ndarray) -> Measure:
    """The win rate that is left where both answers are equally long, in AlpacaEval's minimal form.

    A logistic regression explains wins by the model and by the difference of lengths, logit p = θ + φ·tanh(Δ / std Δ),
    and the result is p at Δ = 0, which is σ(θ). AlpacaEval's published number has a third term, for how difficult each
    of its 805 instructions is, which no other prompts have. The scale std Δ is that of all prompts, in every draw.

    Args:
        wins: As from hard_wins or soft_wins. [P, n, m].
        longer: Length of the model's answer less that of the other's. [P, n, m].
    """
    prompts, per_prompt = len(wins), wins[0].size
    scale = float(longer.std(ddof=1)) if longer.size > 1 else 0.0
    lengths = np.tanh(longer / scale) if scale > 0 else np.zeros(longer.shape)
    wins, lengths = wins.reshape(prompts, per_prompt), lengths.reshape(prompts, per_prompt)
    block = max(1, _BLOCK // wins.size)

    def measure(counts: np.ndarray) -> np.ndarray:
        parts = [counts[first : first + block] for first in range(0, len(counts), block)]
        return np.concatenate([sigmoid(fit(part, wins, lengths)[:, 0]) for part in parts])

    return measure


def fit(counts: np.ndarray, wins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """θ and φ of the likeliest logistic regression, for each of B draws, by Newton's method. [B, 2]

    Args:
        counts: How often each prompt counts. [B, P].
        wins, lengths: What is explained, from 0 to 1, and what explains it beside the constant. [P, k].
    """
    weights = counts[:, :, None] / wins.shape[1]  # the k pairs of answers to a prompt count as one
    found = np.zeros((len(counts), 2))
    for _ in range(_STEPS):
        expected = sigmoid(found[:, 0, None, None] + found[:, 1, None, None] * lengths)  # [B, P, k]
        missing, spread = weights * (wins - expected), weights * expected * (1 - expected)
        slope = np.stack([missing.sum(axis=(1, 2)), (missing * lengths).sum(axis=(1, 2))], axis=1) - RIDGE * found
        both = (spread * lengths).sum(axis=(1, 2))
        first, second = spread.sum(axis=(1, 2)) + RIDGE, (spread * lengths**2).sum(axis=(1, 2)) + RIDGE
        curvature = np.stack([np.stack([first, both], axis=1), np.stack([both, second], axis=1)], axis=1)
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        found += step
        if float(np.abs(step).max()) < _SMALL:
            break
    return found


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x), without overflow."""
    return np.exp(-np.logaddexp(0.0, -values))
