"""Token rewards r̂: one constant number per response token, and the sources they can come from.

    guidance:     β_r (ℓ_guidance − ℓ_ref)                  TGDPO's rewards, and SePO's oracle
    contrastive:  σ(β_r (ℓ_better − ℓ_worse)) − ½           T-REG's rewards: the reference under two prompts
    file:         β_r · a number from a file
    chosen:       1 on the chosen response, 0 on the rejected one

All but `chosen` can be squashed to (−½, ½) and clipped. By default only `contrastive` is squashed, and nothing is
clipped. For `guidance` these defaults are those of TGDPO's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tgdpo_megatron.losses.declaration import Loss
from tgdpo_megatron.losses.pairs import CHOSEN, Pairs

if TYPE_CHECKING:
    from torch import Tensor

SCORE_NAMES = ("reference", "guidance", "better", "worse", "reward")
"""Per-token numbers that do not change in training: log-probs of frozen models, and rewards from a file.

New names may only be added at the end, because a folder of scores stores a name as its index in this list."""

GIVEN_BY = {"reference": ("reference", "better", "worse"), "guidance": ("guidance",)}
"""Frozen model -> the scores that are its log-probs."""


@dataclass(frozen=True)
class RewardSource:
    """One value of `loss.token_rewards`: a source of r̂.

    Attributes:
        meaning: r̂ of a token, for the tables of docs/.
        given_by: The setting that names the model or file behind r̂, for the same tables.
        scores: The per-token scores that r̂ is made of.
        options: The settings that shape r̂, with their defaults. A `beta_r` of None is the `beta` of the loss.
    """

    meaning: str
    given_by: str
    scores: tuple[str, ...]
    options: Mapping[str, Any]


_SHAPE = {"reward_squash": False, "reward_clip": None, "reward_end_of_turn": True}

REWARD_SOURCES: dict[str, RewardSource] = {
    "guidance": RewardSource(
        "β_r (log-prob under an aligned model − log-prob under the reference)",
        "`model.guidance`",
        ("reference", "guidance"),
        {"beta_r": None, **_SHAPE},
    ),
    "contrastive": RewardSource(
        "σ(β_r (log-prob under a prompt for a better response − log-prob under a prompt for a worse one)) − ½",
        "`scores.contrastive_prompts`",
        ("better", "worse"),
        {"beta_r": 1.0, **_SHAPE, "reward_squash": True},
    ),
    "file": RewardSource(
        "β_r · the number in your file",
        "`scores.reward_file`",
        ("reward",),
        {"beta_r": 1.0, **_SHAPE},
    ),
    "chosen": RewardSource(
        "1 in the chosen response, 0 in the rejected one",
        "nothing",
        (),
        {"reward_end_of_turn": True},
    ),
}


def reward_options(loss: Loss, source: str) -> dict[str, Any]:
    """The settings of a loss's token rewards, with their defaults."""
    return {} if loss.order_alone else dict(REWARD_SOURCES[source].options)


def token_rewards(
    source: str,
    pairs: Pairs,
    scores: Mapping[str, Tensor],
    *,
    beta_r: float = 1.0,
    reward_squash: bool = False,
    reward_clip: float | None = None,
    reward_end_of_turn: bool = True,
) -> Tensor:
    """r̂ of each token. [R], detached, in the dtype of the scores, fp32 for `chosen`.

    Args:
        source: `guidance`, `contrastive`, `file` or `chosen`.
        pairs: Pair and side of each token.
        scores: The scores of the source: log-probs `reference` and `guidance`, or `better` and `worse`, nats; or
            `reward`. Each [R].
        beta_r: Scale, > 0.
        reward_squash: Whether to take σ(r̂) − ½ instead of r̂.
        reward_clip: Largest |r̂|; None for no limit.
        reward_end_of_turn: Whether the last token of a response keeps its reward. False gives it 0.
    """
    rewards = beta_r * _raw(source, pairs, scores).detach()
    if reward_squash:
        rewards = rewards.sigmoid() - 0.5
    if reward_clip is not None:
        rewards = rewards.clamp(-reward_clip, reward_clip)
    return rewards if reward_end_of_turn else rewards.where(~pairs.last(), 0)


def _raw(source: str, pairs: Pairs, scores: Mapping[str, Tensor]) -> Tensor:
    if source == "guidance":
        return scores["guidance"] - scores["reference"]
    if source == "contrastive":
        return scores["better"] - scores["worse"]
    if source == "file":
        return scores["reward"]
    if source == "chosen":
        return (pairs.side == CHOSEN).float()
    raise ValueError(f"no source of token rewards is called {source}")
