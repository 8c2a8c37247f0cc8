"""What the miniature compares, and the configurations that every method is tuned over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

Rewards = Literal["guidance", "shuffled", "mean", "true"]
"""Token rewards: log-ratio of the guidance to the start; the same shuffled within every answer; its mean over the
answer, on all tokens; what the known reward says."""

LEARNING_RATE = 7e-5
"""Of all methods. With Adam the size of a step depends on it, and hardly on the scale of a loss."""


@dataclass(frozen=True)
class Setting:
    """A method's settings.

    Attributes:
        loss: One of `loss.type`.
        margin: SimPO's `loss.gamma_beta_ratio`.
        spread: TGDPO's standard deviation of the token weights over the training pairs, which `loss.alpha` follows
            from: the same α means different things for different guidance.
    """

    loss: str
    beta: float
    margin: float = 0.0
    spread: float = 0.0

    @property
    def name(self) -> str:
        """For a folder."""
        return f"{self.loss}-{self.beta:g}-{self.margin or self.spread:g}"

    def __str__(self) -> str:
        options = {"simpo": f", γ/β {self.margin:g}", "tgdpo": f", weights ± {self.spread:g}"}
        return f"β {self.beta:g}{options.get(self.loss, '')}"


SPREADS = (0.1, 0.3, 1.0)
"""Standard deviations of TGDPO's token weights."""
TRIED = {
    "DPO": [Setting("dpo", beta) for beta in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)],
    "SimPO": [Setting("simpo", beta, margin=margin) for beta, margin in product((2.5, 5.0, 10.0), (0.2, 0.55))],
    "TGDPO": [Setting("tgdpo", beta, spread=spread) for beta, spread in product((0.1, 0.3, 1.0), SPREADS[1:])],
}
"""Method -> all configurations that it is tuned over, as many for each method."""


def with_other_beta(setting: Setting) -> Setting:
    """The same but for β: ten times as large, or a tenth of one that is 0.3 or more."""
    return replace(setting, beta=setting.beta * (10 if setting.beta < 0.3 else 0.1))
