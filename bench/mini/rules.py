"""The decision rules of the miniature, which were written down before the runs that they judge.

A claim is one number for each seed, mostly the difference between two runs from the same start. What decides is the
95 % interval of Student's t over the seeds. Nothing here knows how the numbers are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
T_800 = {1: 1.376, 2: 1.061, 3: 0.978, 4: 0.941, 5: 0.920, 6: 0.906, 7: 0.896, 8: 0.889, 9: 0.883}
"""Degrees of freedom -> quantile of Student's t at 97.5 % and at 80 %."""

Word = Literal["reproduced", "contradicted", "undecided"]


@dataclass(frozen=True)
class Claim:
    """Something the paper says, as this miniature can test it.

    Attributes:
        name: Short name, as the tables have it.
        says: What is claimed.
        number: The number of one seed. It is above 0 where the claim holds.
        unit: Of the number.
        within: Where nothing should change, the largest difference that counts as none; the number is then the
            difference itself.
    """

    name: str
    says: str
    number: str
    unit: str
    within: float | None = None


CLAIMS = (
    Claim(
        "C1",
        "TGDPO is better than DPO",
        "TGDPO's win rate less DPO's, after one epoch",
        "points",
    ),
    Claim(
        "C2",
        "TGDPO is better than SimPO",
        "TGDPO's win rate less SimPO's, after one epoch",
        "points",
    ),
    Claim(
        "C3, DPO",
        "TGDPO can be trained on, where DPO gets worse again",
        "DPO's drop less TGDPO's: win rate of the best checkpoint of three epochs less that of the last",
        "points",
    ),
    Claim(
        "C3, SimPO",
        "the same of SimPO",
        "SimPO's drop less TGDPO's",
        "points",
    ),
    Claim(
        "C4",
        "TGDPO learns faster with a larger α",
        "steps with token weights of standard deviation 0.1 less steps with 1, until the held-out preference accuracy "
        "is first the best of DPO's first epoch; a run that does not reach it counts as the epoch and one evaluation "
        "more",
        "steps",
    ),
    Claim(
        "C5",
        "TGDPO hardly depends on which DPO run guides it",
        "TGDPO's win rate with guidance from DPO at another β (ten times the tuned one, or a tenth where that is 0.3 "
        "or more), less that with the tuned guidance, after one epoch",
        "points",
        within=5.0,
    ),
)
"""What is known of the paper: +2.2 points over DPO and +4.1 over SimPO in AlpacaEval 2; DPO falling from 41.7 to 30.7
and SimPO from 39.8 to 4.6 when trained on, TGDPO not; 42.8 instead of 43.9 with other guidance."""

QUESTIONS = (
    Claim(
        "Q1",
        "at equal distance from the start, TGDPO has more reward than DPO",
        "known reward of TGDPO less DPO's, each interpolated along its run, at the largest KL divergence that both "
        "reach",
        "reward",
    ),
    Claim(
        "Q2",
        "which token has which r̂ matters",
        "TGDPO's win rate less that of TGDPO with every answer's r̂ shuffled",
        "points",
    ),
    Claim(
        "Q3",
        "it matters more than an answer's mean r̂",
        "TGDPO's win rate less that of TGDPO with r̂ replaced by its mean over the answer",
        "points",
    ),
    Claim(
        "Q4",
        "true token rewards help",
        "win rate of TGDPO with the true token rewards less that of DPO with TGDPO's β",
        "points",
    ),
    Claim(
        "Q5",
        "TGDPO is better than DPO with the steps that its guidance took",
        "TGDPO's win rate after one epoch less DPO's after two",
        "points",
    ),
    Claim(
        "Q6",
        "TGDPO raises right tokens more than DPO",
        "mean change of the log-prob of right tokens in chosen held-out answers under TGDPO, less that under DPO with "
        "TGDPO's β",
        "nats",
    ),
    Claim(
        "Q7",
        "guidance helps at the same β",
        "TGDPO's win rate less that of DPO with TGDPO's β, after one epoch",
        "points",
    ),
    Claim(
        "Q8",
        "guidance, and not β, keeps TGDPO from getting worse again",
        "drop of DPO with TGDPO's β less TGDPO's",
        "points",
    ),
)
"""What the paper does not say, but what would explain its result or ours. The same rule decides."""


@dataclass(frozen=True)
class Judged:
    """A claim's numbers over the seeds.

    Attributes:
        low, high: 95 % interval of the mean.
        detectable: The true mean that this interval would leave on the right side of 0 in four of five repetitions,
            at the spread that the seeds have.
    """

    mean: float
    low: float
    high: float
    detectable: float
    verdict: Word


def judge(values: Sequence[float], within: float | None = None) -> Judged:
    """Decide a claim.

    `reproduced`: the interval lies above 0; with `within`, inside ±within. `contradicted`: it lies below 0; with
    `within`, wholly outside. `undecided` otherwise.

    Args:
        values: One for each seed, at least two.
    """
    freedom = len(values) - 1
    middle, error = mean(values), stdev(values) / math.sqrt(len(values))
    low, high = middle - T_975[freedom] * error, middle + T_975[freedom] * error
    holds = low > 0 if within is None else -within < low and high < within
    fails = high < 0 if within is None else high < -within or low > within
    return Judged(
        middle,
        low,
        high,
        (T_975[freedom] + T_800[freedom]) * error,
        "reproduced" if holds else "contradicted" if fails else "undecided",
    )
