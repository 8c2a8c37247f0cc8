"""Bootstrap over prompts: intervals that hold what they say, and differences on the same draws."""

from __future__ import annotations

import numpy as np
import pytest

from tgdpo_megatron.evaluation.bootstrap import DRAWS, mean, measured, ratio


def test_the_values_are_those_of_a_plain_loop_over_drawn_prompts() -> None:
    rng = np.random.default_rng(1)
    above, below = rng.normal(size=7), rng.uniform(1, 2, size=7)
    found = measured({"mean": mean(above), "ratio": ratio(above, below)}, 7, seed=3, draws=50)
    counts = np.random.default_rng(3).multinomial(7, [1 / 7] * 7, size=50)
    for draw, times in enumerate(counts):
        prompts = [prompt for prompt, count in enumerate(times) for _ in range(count)]
        assert len(prompts) == 7
        assert found["mean"].draws[draw] == pytest.approx(sum(above[prompts]) / 7, abs=1e-12)
        assert found["ratio"].draws[draw] == pytest.approx(sum(above[prompts]) / sum(below[prompts]), abs=1e-12)
    assert found["mean"].value == pytest.approx(above.mean(), abs=1e-12)
    assert found["ratio"].value == pytest.approx(above.sum() / below.sum(), abs=1e-12)


def test_as_many_draws_are_made_whatever_the_number_of_prompts() -> None:
    for prompts in (1, 700, 1500):
        assert measured({"": mean(np.arange(prompts, dtype=np.float64))}, prompts, seed=0)[""].draws.shape == (DRAWS,)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Three answers to a prompt are alike: 95 % intervals over prompts hold the mean, those over answers do not."""
    rng, worlds, prompts = np.random.default_rng(0), 500, 80
    covered = {"prompts": 0, "answers": 0}
    for world in range(worlds):
        answers = rng.normal(0.3, 1, size=(prompts, 1)) + rng.normal(0, 0.4, size=(prompts, 3))
        for name, units in (("prompts", answers.mean(axis=1)), ("answers", answers.reshape(-1))):
            low, high = measured({"": mean(units)}, len(units), seed=world, draws=300)[""].interval
            covered[name] += low <= 0.3 <= high
    assert 0.92 <= covered["prompts"] / worlds <= 0.97
    assert covered["answers"] / worlds < 0.85


def test_a_difference_has_the_interval_of_paired_prompts() -> None:
    """What two models owe to the same easy and hard prompts cancels."""
    rng = np.random.default_rng(2)
    common = rng.normal(0, 5, size=300)
    first, second = common + rng.normal(0, 0.1, size=300), common + 0.2 + rng.normal(0, 0.1, size=300)
    found = measured({"a": mean(first), "b": mean(second), "b - a": mean(second - first)}, 300, seed=0)
    difference = found["b"] - found["a"]
    assert difference.value == pytest.approx(found["b - a"].value, abs=1e-12)
    assert difference.interval == pytest.approx(found["b - a"].interval, abs=1e-12)
    assert 0.17 < difference.interval[0] < 0.2 < difference.interval[1] < 0.23
    assert found["a"].interval[1] > found["b"].interval[0]
