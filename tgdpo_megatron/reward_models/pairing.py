"""Pairs from scores: which two answers become the chosen and the rejected one, or why a prompt gives no pair."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tgdpo_megatron.errors import UserError

Pick = Literal["best-worst", "best-random"]
PICKS: tuple[Pick, ...] = get_args(Pick)
LEFT_OUT = {
    "repeated": "the prompt was there before",
    "identical": "all answers are the same",
    "too_few": "fewer than two answers are finished and not empty",
    "refused": "the reward model does not take such turns",
    "too_long": "fewer than two answers fit the reward model",
    "ties": "all answers have the same score",
    "below_margin": "no answer is --margin below the best one",
}
"""Why a prompt gives no pair."""


class NoPair(Exception):
    """A prompt gives no pair; the message is one of LEFT_OUT."""


@dataclass(frozen=True)
class Rules:
    """How pairs are made.

    Attributes:
        pick: The rejected answer is the one with the lowest score, or any of the worse ones at random.
        margin: By how much the score of the chosen answer must be higher, at least. Equal scores are never a pair.
        keep_unfinished: Whether answers that reached their largest length take part.
        seed: Of what is picked at random.
    """

    pick: Pick = "best-worst"
    margin: float = 0.0
    keep_unfinished: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse values without meaning.

        Raises:
            UserError: The margin is negative or not finite.
        """
        if not 0 <= self.margin < math.inf:
            raise UserError(f"--margin {self.margin} is refused: it should be 0 or a positive number.")


def check_any(answers: Sequence[str], usable: Sequence[int]) -> None:
    """Refuse a prompt that gives no pair, whatever the scores.

    Args:
        answers: All answers to the prompt.
        usable: Places of those that take part.

    Raises:
        NoPair: Fewer than two take part, or all are the same.
    """
    if len(answers) > 1 and len(set(answers)) == 1:
        raise NoPair("identical")
    if len(usable) < 2:
        raise NoPair("too_few")
    if len({answers[place] for place in usable}) == 1:
        raise NoPair("identical")


def choose(scores: np.ndarray, prompt: str, rules: Rules) -> tuple[int, int]:
    """Places of the chosen and the rejected answer; of equals the first.

    Args:
        scores: NaN for answers that were not scored. [A] float64.
        prompt: The prompt's id, from which and from the seed what is random follows.

    Raises:
        NoPair: Fewer than two answers were scored, all have the same score, or none is the margin below the best.
    """
    scored = np.flatnonzero(~np.isnan(scores))
    if len(scored) < 2:
        raise NoPair("too_long")
    best = int(scored[scores[scored].argmax()])
    worse = scored[scores[scored] < scores[best]]
    if not len(worse):
        raise NoPair("ties")
    far = worse[scores[best] - scores[worse] >= rules.margin]
    if not len(far):
        raise NoPair("below_margin")
    if rules.pick == "best-worst":
        return best, int(far[scores[far].argmin()])
    digest = hashlib.sha256(f"{rules.seed} {prompt}".encode()).digest()
    return best, int(far[int.from_bytes(digest[:8], "big") % len(far)])
