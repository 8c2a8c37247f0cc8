"""What the token-credit benchmark measures, in NumPy: rewards against known mistakes, and how far training moved what.

Legend: N tokens of all responses of a data set, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from tools.demo.report import area_under_roc


@dataclass(frozen=True)
class Marks:
    """Which tokens are what. A token belongs to a span when it shares a character with it.

    Attributes:
        pair, side: Of each token. [N] int64.
        wrong: Tokens of rejected responses that are known to be wrong. [N] bool.
        first_wrong: The first token of every wrong span: what follows it may well be right, given it. [N] bool.
        kept: The other tokens of rejected responses, the end-of-turn token included. [N] bool.
        right: Tokens of chosen responses that stand where the rejected one is wrong. [N] bool.
    """

    pair: np.ndarray
    side: np.ndarray
    wrong: np.ndarray
    first_wrong: np.ndarray
    kept: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Detection:
    """How well −r̂ tells the wrong tokens of rejected responses from the others.

    Attributes:
        auroc: Probability that a wrong token has the lower reward; ties count half; 0.5 is chance.
        average_precision: Chance is the share of wrong tokens.
        auroc_first: The same of the first token of every wrong span alone; the others of the span are left out.
    """

    auroc: float
    average_precision: float
    auroc_first: float


def detection(rewards: np.ndarray, marks: Marks) -> Detection:
    """Rank the tokens of all rejected responses together by −r̂. `rewards` [N]."""
    suspicion = -rewards.astype(np.float64)
    wrong, first, kept = suspicion[marks.wrong], suspicion[marks.first_wrong], suspicion[marks.kept]
    return Detection(
        auroc=area_under_roc(wrong.tolist(), kept.tolist()),
        average_precision=average_precision(wrong, kept),
        auroc_first=area_under_roc(first.tolist(), kept.tolist()),
    )


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Σ (recall gained at a threshold × precision there), over thresholds from high to low; ties share a threshold."""
    values = np.concatenate([positive, negative])
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(order < len(positive))
    last_of_ties = np.append(np.diff(values[order]) != 0, True)
    hits, ranks = hits[last_of_ties], np.flatnonzero(last_of_ties) + 1
    return float((np.diff(hits, prepend=0) * hits / ranks).sum() / len(positive))


def preference_accuracy(logps: np.ndarray, marks: Marks) -> float:
    """Share of pairs whose chosen response is the likelier one: log-probs summed, no reference. `logps` [N], nats."""
    sums = np.zeros((marks.pair.max() + 1, 2))
    np.add.at(sums, (marks.pair, marks.side), logps)
    return float((sums[:, 0] > sums[:, 1]).mean())


def exact_match(likeliest: np.ndarray, marks: Marks) -> float:
    """Share of prompts whose greedy answer is the chosen one.

    Greedy decoding gives the chosen response if and only if each of its tokens, the end-of-turn token included, is
    the likeliest after the ones before it; so no text is generated. `likeliest` [N] bool.
    """
    missed = np.zeros(marks.pair.max() + 1, bool)
    missed[marks.pair[(marks.side == 0) & ~likeliest]] = True
    return float(1 - missed.mean())


def moved(before: np.ndarray, after: np.ndarray, marks: Marks) -> dict[str, float]:
    """Mean change per token, of probability (`mass`) and of log-prob (`nats`), on wrong, kept and right tokens.

    Args:
        before, after: Log-probs of all tokens under the model training started from and ended with. [N], nats.
    """
    mass, nats = np.exp(after) - np.exp(before), after - before
    groups = {"wrong": marks.wrong, "kept": marks.kept, "right": marks.right}
    return {f"mass_{name}": float(mass[group].mean()) for name, group in groups.items()} | {
        f"nats_{name}": float(nats[group].mean()) for name, group in groups.items()
    }


def steps_to_reach(target: float, curve: Mapping[int, float]) -> int | None:
    """The first evaluated step with at least the target, or None. `curve`: step -> value."""
    return min((step for step, value in curve.items() if value >= target), default=None)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; no spread (nan) of a single value."""
    return mean(values), stdev(values) if len(values) > 1 else math.nan
