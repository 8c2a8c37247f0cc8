"""What the miniature measures of answers and of token log-probs, against the reward that is known.

Legend: P prompts, n answers to each, N tokens of all responses of a file of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.mini.world import Prompt, reward
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.sampling.answers import Answered, read_answers


@dataclass(frozen=True)
class JudgedAnswers:
    """A model's answers to the held-out prompts, judged by the known reward.

    Attributes:
        wins: Win rate against the start on each prompt: every answer against every answer, ties half. P of them.
        reward: Mean known reward of an answer.
        tokens: Mean length of an answer.
        unfinished: Share of answers that had no room left.
    """

    wins: list[float]
    reward: float
    tokens: float
    unfinished: float


def judged(model: Path, start: Path) -> JudgedAnswers:
    """Judge a file of answers against the start's file of answers to the same prompts."""
    answers, others = list(read_answers(model)), {answered.prompt_id: answered for answered in read_answers(start)}
    rewards = [_of(answered) for answered in answers]
    tokens = [number for answered in answers for number in answered.num_tokens]
    reasons = [reason for answered in answers for reason in answered.finish_reasons]
    return JudgedAnswers(
        wins=[win_share(own, _of(others[answered.prompt_id])) for answered, own in zip(answers, rewards, strict=True)],
        reward=float(np.mean(rewards)),
        tokens=sum(tokens) / len(tokens),
        unfinished=reasons.count("length") / len(reasons),
    )


def rewards_of(prompt: str, answers: Sequence[str]) -> np.ndarray:
    """Known reward of every answer to a prompt. [n] float64."""
    return np.array([reward(Prompt.parse(prompt), answer) for answer in answers])


def _of(answered: Answered) -> np.ndarray:
    assert isinstance(answered.prompt, str)
    return rewards_of(answered.prompt, answered.all_generated_responses)


def win_share(scores: np.ndarray, others: np.ndarray) -> float:
    """How often a score is higher than another: all against all, ties half. [n], [m]."""
    return float((np.sign(scores[:, None] - others[None, :]).mean() + 1) / 2)


def agreement(scores: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """How many pairs of answers to one prompt two scores put in the same order, and how many they could. [n], [n].

    Pairs of equal truth are left out; equal scores count half.
    """
    above = np.triu(np.ones((len(truth), len(truth)), bool), 1)
    given, true = np.sign(scores[:, None] - scores)[above], np.sign(truth[:, None] - truth)[above]
    counted = true != 0
    return float(((given * true + 1) / 2)[counted].sum()), int(counted.sum())


def moved(before: np.ndarray, after: np.ndarray, truth: np.ndarray, side: np.ndarray) -> dict[str, float]:
    """Mean change of the log-prob of a token, nats, by what the token is worth and by the side it stands on.

    Args:
        before, after: Log-probs under the start and under the trained model. [N], nats.
        truth: What each token adds to the known reward. [N]
        side: CHOSEN or REJECTED. [N]
    """
    change = after - before
    kinds = {"right": truth > 0, "wrong": truth < 0, "other": truth == 0}
    sides = {"chosen": side == CHOSEN, "rejected": side == REJECTED}
    return {
        f"{kind} in {name}": float(change[is_kind & is_side].mean())
        for kind, is_kind in kinds.items()
        for name, is_side in sides.items()
    }


def at_divergence(level: float, divergences: Sequence[float], rewards: Sequence[float]) -> float:
    """The reward where a run first comes so far from the start, between checkpoints on a straight line.

    Args:
        level: KL divergence from the start, nats; the run reaches it.
        divergences, rewards: Of the start and of every checkpoint, in order.
    """
    for place in range(1, len(divergences)):
        low, high = divergences[place - 1], divergences[place]
        if min(low, high) <= level <= max(low, high):
            share = (level - low) / (high - low) if high > low else 0.0
            return rewards[place - 1] + share * (rewards[place] - rewards[place - 1])
    raise ValueError(f"the run does not reach {level} nats: {divergences}")


def steps_to_reach(target: float, curve: Mapping[int, float], *, otherwise: int) -> int:
    """The first evaluated step with at least the target. `curve`: step -> value."""
    return min((step for step, value in curve.items() if value >= target), default=otherwise)
