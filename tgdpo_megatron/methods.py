"""Which method reads what. No formulas here (see losses/), no torch: a wrong setting is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCORE_NAMES = ("reference", "guidance", "better", "worse", "reward")
"""Per-token numbers that do not change in training: log-probs of frozen models, and rewards from elsewhere.

Only ever added to at the end: the store keeps a name as its place here."""

GIVEN_BY = {"reference": ("reference", "better", "worse"), "guidance": ("guidance",)}
"""Frozen model -> the scores that are its log-probs."""

SequenceWeight = Literal["detached", "attached", "static"]


@dataclass(frozen=True)
class Method:
    """What one `loss.type` reads.

    Attributes:
        options: Settings of the loss and their defaults. Any other is refused: nothing is silently ignored.
        reads: Per-token numbers beside the policy's log-probs: `reference` log-probs, token `rewards`, the
            `divergence` of the policy from the reference over the whole vocabulary.
        rewards: Where its token rewards come from unless `loss.token_rewards` says otherwise.
        order_alone: It reads which rewards are higher, not how high: scaling or squashing them would change nothing.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    rewards: str | None = None
    order_alone: bool = False


_REFERENCE, _REWARDS, _DIVERGENCE = ("reference",), ("rewards",), ("reference", "divergence")
_WEIGHTED = {"sequence_weight": "detached", "static_weight": None}

METHODS = {
    "sft": Method(),
    "dpo": Method({"beta": 0.1, "label_smoothing": 0.0}, _REFERENCE),
    "dpo_norm": Method({"beta": 2.0, "label_smoothing": 0.0}, _REFERENCE),
    "robust": Method({"beta": 0.1, "label_smoothing": 0.1}, _REFERENCE),
    "hinge": Method({"beta": 0.1}, _REFERENCE),
    "ipo": Method({"beta": 0.1}, _REFERENCE),
    "ipo_sum": Method({"beta": 0.1}, _REFERENCE),
    "simpo": Method({"beta": 2.5, "gamma_beta_ratio": 0.55, "label_smoothing": 0.0}),
    "tgdpo": Method({"beta": 0.1, "alpha": 0.5}, _REFERENCE + _REWARDS, "guidance"),
    "tdpo1": Method({"beta": 0.1}, _DIVERGENCE),
    "tdpo2": Method({"beta": 0.1, "alpha": 0.5}, _DIVERGENCE),
    "sepo": Method({"gamma": 2.1, "selected_share": 0.3}, _REWARDS, "guidance", order_alone=True),
    "dpo_reg": Method({"beta": 0.1, "alpha": 0.25, **_WEIGHTED}, _REFERENCE + _REWARDS, "contrastive"),
    "simpo_reg": Method({"beta": 2.5, "gamma_beta_ratio": 0.55, "alpha": 0.25, **_WEIGHTED}, _REWARDS, "contrastive"),
}


@dataclass(frozen=True)
class Source:
    """One `loss.token_rewards`: where r̂ comes from.

    Attributes:
        scores: The stored per-token numbers it is made of.
        options: Settings it reads, and their defaults; a `beta_r` of None is the method's `beta`.
    """

    scores: tuple[str, ...]
    options: Mapping[str, Any]


_SHAPE = {"reward_squash": False, "reward_clip": None, "reward_end_of_turn": True}

SOURCES: dict[str, Source] = {
    "guidance": Source(("reference", "guidance"), {"beta_r": None, **_SHAPE}),
    "contrastive": Source(("better", "worse"), {"beta_r": 1.0, **_SHAPE, "reward_squash": True}),
    "file": Source(("reward",), {"beta_r": 1.0, **_SHAPE}),
    "chosen": Source((), {"reward_end_of_turn": True}),
}


def reward_options(method: Method, source: str) -> dict[str, Any]:
    """The settings of a method's token rewards, and their defaults."""
    return {} if method.order_alone else dict(SOURCES[source].options)
