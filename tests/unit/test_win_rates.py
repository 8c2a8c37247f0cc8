"""Win rates: ties, swaps, and what length control leaves of a scorer that likes long answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tgdpo_megatron.evaluation.bootstrap import measured
from tgdpo_megatron.evaluation.win_rates import RIDGE, fit, hard_wins, length_controlled, sigmoid, soft_wins


def rate(wins: np.ndarray, longer: np.ndarray) -> float:
    """The length-controlled win rate on all prompts."""
    return float(length_controlled(wins, longer)(np.ones((1, len(wins))))[0])


def test_wins_are_those_of_a_plain_loop() -> None:
    model, other = np.array([[1.0, 2.0, 2.0], [0.0, -1.0, 5.0]]), np.array([[2.0, 0.5], [0.0, 7.0]])
    hard, soft = hard_wins(model, other), soft_wins(model, other)
    for prompt in range(2):
        for place, mine in enumerate(model[prompt]):
            for against, theirs in enumerate(other[prompt]):
                expected = 1.0 if mine > theirs else 0.5 if mine == theirs else 0.0
                assert hard[prompt, place, against] == expected
                assert soft[prompt, place, against] == pytest.approx(1 / (1 + math.exp(theirs - mine)), abs=1e-15)


def test_swapping_two_models_gives_one_minus_each_rate() -> None:
    rng = np.random.default_rng(0)
    model, other = rng.integers(0, 4, (60, 3)).astype(float), rng.integers(0, 4, (60, 2)).astype(float)
    longer = rng.normal(20, 100, (60, 3, 2))
    for wins in (hard_wins, soft_wins):
        there, back = wins(model, other), wins(other, model)
        assert there.mean() == pytest.approx(1 - back.mean(), abs=1e-14)
        assert rate(there, longer) == pytest.approx(1 - rate(back, -longer.transpose(0, 2, 1)), abs=1e-12)


def test_a_longer_copy_moves_the_raw_rate_and_not_the_length_controlled_one() -> None:
    """The answers differ in length alone, the scorer likes length, and nine in ten are longer than the start's."""
    rng = np.random.default_rng(4)
    longer = rng.normal(150, 120, (1500, 1, 1))
    preferred = sigmoid(2 * np.tanh(longer / longer.std(ddof=1)))
    assert preferred.mean() > 0.75 and rate(preferred, longer) == pytest.approx(0.5, abs=1e-3)
    wins = (rng.random(preferred.shape) < preferred).astype(float)
    low, high = measured({"": length_controlled(wins, longer)}, 1500, seed=0, draws=200)[""].interval
    assert wins.mean() > 0.75 and low < 0.5 < high and high - low < 0.12


def test_better_answers_of_any_length_keep_their_win_rate() -> None:
    rng = np.random.default_rng(5)
    longer = rng.normal(0, 50, (1500, 1, 1))
    wins = (rng.random(longer.shape) < 0.7).astype(float)
    assert rate(wins, longer) == pytest.approx(wins.mean(), abs=0.02)


def test_answers_of_one_length_and_winners_of_every_comparison_have_a_rate() -> None:
    wins = np.ones((40, 1, 1))
    assert 0.99 < rate(wins, np.random.default_rng(0).normal(size=(40, 1, 1))) < 1
    assert rate(wins * 0.5, np.zeros((40, 1, 1))) == pytest.approx(0.5, abs=1e-12)
    assert rate(np.ones((1, 1, 1)) * 0.5, np.ones((1, 1, 1))) == pytest.approx(0.5, abs=1e-12)


def test_the_fit_is_where_the_penalised_likelihood_is_flat() -> None:
    """In float64, by torch's own derivatives, for every draw, also where one side nearly always wins, and where
    wins are probabilities. The likelihood is concave, so that it is highest there."""
    rng = np.random.default_rng(6)
    counts = rng.multinomial(25, [1 / 25] * 25, size=40).astype(float)
    for wins in (*((rng.random((25, 4)) < share).astype(float) for share in (0.02, 0.5, 0.97)), rng.random((25, 4))):
        lengths = np.tanh(rng.normal(0.5, 1, (25, 4)))
        found = torch.tensor(fit(counts, wins, lengths), requires_grad=True)
        logits = found[:, :1, None] + found[:, 1:, None] * torch.tensor(lengths)
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.tensor(wins).expand(logits.shape), reduction="none"
        )
        loss = (each.mean(dim=2) * torch.tensor(counts)).sum() + RIDGE / 2 * (found**2).sum()
        (slope,) = torch.autograd.grad(loss, found)
        assert float(slope.abs().max()) < 1e-8
