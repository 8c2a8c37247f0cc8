"""What the miniature compares, and the configurations that every method is tuned over."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

Rewards = Literal["guidance", "shuffled", "mean", "true"]
"""Token rewards: log-ratio of the guidance to the start; the same shuffled within every answer; its mean over the
answer, on all tokens; what the known reward says."""


@dataclass(frozen=True)
class Setting:
    """A method's settings.

    Attributes:
        loss: One of `loss.type`.
        option: SimPO's `loss.gamma_beta_ratio`. For TGDPO the standard deviation of the token weights over the training
            pairs, which `loss.alpha` follows from: the same α means different things for different guidance.
    """

    loss: str
    lr: float
    beta: float
    option: float = 0.0

    @property
    def name(self) -> str:
        """For a folder."""
        return f"{self.loss}-{self.lr:g}-{self.beta:g}-{self.option:g}"

    def __str__(self) -> str:
        options = {"simpo": f", γ/β {self.option:g}", "tgdpo": f", weights ± {self.option:g}"}
        return f"learning rate {self.lr:g}, β {self.beta:g}{options.get(self.loss, '')}"


LEARNING_RATES = (2.5e-5, 5e-5, 1e-4)
BETAS = (0.03, 0.1, 0.3, 1.0)
SPREADS = (0.1, 0.3, 1.0)
"""Standard deviations of TGDPO's token weights, whose mean is about 1."""
SIMPO_BETAS = (1.0, 2.5, 5.0, 10.0)
SIMPO_MARGINS = (0.2, 0.55)


def configurations(loss: str, number: int, seed: int) -> list[Setting]:
    """So many different configurations of a method, drawn at random."""
    grids = {
        "dpo": (LEARNING_RATES, BETAS, (0.0,)),
        "simpo": (LEARNING_RATES, SIMPO_BETAS, SIMPO_MARGINS),
        "tgdpo": (LEARNING_RATES, BETAS, SPREADS),
    }
    drawn = random.Random(seed).sample(list(product(*grids[loss])), number)
    return [Setting(loss, *values) for values in drawn]


def with_other_beta(setting: Setting) -> Setting:
    """The same but for β: ten times as large, or a tenth of one that is 0.3 or more."""
    return replace(setting, beta=setting.beta * (10 if setting.beta < 0.3 else 0.1))
