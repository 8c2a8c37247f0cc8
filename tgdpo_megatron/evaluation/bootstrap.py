"""Numbers with their uncertainty: each is measured again on prompts that are drawn anew, with replacement.

What is drawn are prompts, with all that belongs to one: several answers to a prompt are alike, and counting them as
independent would make intervals too narrow. The same number of all models is measured on the same draws, so the
difference of two models has an interval of its own, in which what both owe to easy or hard prompts cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

DRAWS = 2000
LEVEL = 0.95
"""The share of draws that an interval holds."""
_BLOCK = 1 << 20
"""Most numbers of one block of draws."""

Measure = Callable[[np.ndarray], np.ndarray]
"""How often each prompt counts, in each of B draws [B, P] -> what is measured there [B]. All float64."""
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Measured:
    """What was measured on the prompts as they are, and on every draw of them.

    Attributes:
        draws: [DRAWS] float64, in the order of the draws.
    """

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """Between the two lies LEVEL of the draws: the percentile bootstrap."""
        low, high = np.quantile(self.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def __sub__(self, other: Measured) -> Measured:
        """The difference, draw by draw. Both were measured on the same draws."""
        return Measured(self.value - other.value, self.draws - other.draws)


def measured(measures: Mapping[Name, Measure], prompts: int, *, seed: int, draws: int = DRAWS) -> dict[Name, Measured]:
    """Measure on all prompts once, and on as many prompts drawn with replacement, `draws` times.

    Args:
        prompts: Their number P, at least 1.
        seed: Of the draws. Equal seeds and numbers of prompts give equal draws.
    """
    generator, even = np.random.default_rng(seed), np.full(prompts, 1 / prompts)
    found: dict[Name, list[np.ndarray]] = {name: [] for name in measures}
    block = max(1, _BLOCK // prompts)
    for first in range(0, draws, block):
        counts = generator.multinomial(prompts, even, size=min(block, draws - first)).astype(np.float64)
        for name, measure in measures.items():
            found[name].append(measure(counts))
    once = np.ones((1, prompts))
    return {name: Measured(float(measure(once)[0]), np.concatenate(found[name])) for name, measure in measures.items()}


def mean(values: np.ndarray) -> Measure:
    """The mean over prompts of one number each. [P]"""
    return lambda counts: counts @ values / counts.sum(axis=1)


def ratio(above: np.ndarray, below: np.ndarray) -> Measure:
    """The sum over prompts of one number divided by that of another. [P], [P], the second positive."""
    return lambda counts: (counts @ above) / (counts @ below)
