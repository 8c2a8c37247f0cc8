"""What is the loss of one pair? Each method written out again, response by response, in float64.

Nothing of tgdpo_megatron.losses takes part, and no default of ours: METHODS says every number twice, once as our
settings and once as the formula's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus  # −log σ(z) = softplus(−z)

from tgdpo_megatron.config import LossConfig


@dataclass(frozen=True)
class Response:
    """One response of a pair, T tokens.

    Attributes:
        policy: Token log-probs under the policy, nats. [T] float64; carries gradient.
        divergence: KL(reference ‖ policy) over the whole vocabulary at each token's place, nats. [T]; carries gradient.
        scores: What does not change in training, by name. Each [T].
    """

    policy: Tensor
    divergence: Tensor
    scores: dict[str, Tensor]
    chosen: bool

    @property
    def log_ratio(self) -> Tensor:
        """Of the policy to the reference. [T]"""
        return self.policy - self.scores["reference"]


Formula = Callable[[Response, Response], Tensor]
Rewards = Callable[[Response], Tensor]


# Token rewards r̂.


def of_guidance(y: Response) -> Tensor:
    return y.scores["guidance"] - y.scores["reference"]


def of_contrastive_prompts(y: Response) -> Tensor:
    return torch.sigmoid(y.scores["better"] - y.scores["worse"]) - 0.5


def of_file(y: Response, *, beta_r: float, limit: float) -> Tensor:
    """Scaled, cut off at ±limit, and 0 for the token that closes the response."""
    rewards = (beta_r * y.scores["reward"]).clamp(-limit, limit)
    rewards[-1] = 0
    return rewards


def of_the_label(y: Response) -> Tensor:
    return torch.full_like(y.policy.detach(), 1.0 if y.chosen else 0.0)


# Losses of a pair. w and l in the papers: the chosen response won, the rejected one lost.


def sft(won: Response, lost: Response) -> Tensor:
    return -won.policy.mean()


def dpo(won: Response, lost: Response, *, beta: float, epsilon: float = 0.0, nll: float = 0.0) -> Tensor:
    z = beta * won.log_ratio.sum() - beta * lost.log_ratio.sum()
    return (1 - epsilon) * softplus(-z) + epsilon * softplus(z) - nll * won.policy.mean()


def dpo_norm(won: Response, lost: Response, *, beta: float) -> Tensor:
    return softplus(-beta * (won.log_ratio.mean() - lost.log_ratio.mean()))


def robust(won: Response, lost: Response, *, beta: float, epsilon: float) -> Tensor:
    z = beta * won.log_ratio.sum() - beta * lost.log_ratio.sum()
    return ((1 - epsilon) * softplus(-z) - epsilon * softplus(z)) / (1 - 2 * epsilon)


def hinge(won: Response, lost: Response, *, beta: float) -> Tensor:
    z = beta * won.log_ratio.sum() - beta * lost.log_ratio.sum()
    return 1 - z if z < 1 else 0 * z


def ipo(won: Response, lost: Response, *, beta: float) -> Tensor:
    return (won.log_ratio.mean() - lost.log_ratio.mean() - 1 / (2 * beta)) ** 2


def ipo_sum(won: Response, lost: Response, *, beta: float) -> Tensor:
    return (won.log_ratio.sum() - lost.log_ratio.sum() - 1 / (2 * beta)) ** 2


def simpo(won: Response, lost: Response, *, beta: float, gamma: float) -> Tensor:
    return softplus(-(beta * won.policy.mean() - beta * lost.policy.mean() - gamma))


def rpo(won: Response, lost: Response, *, rewards: Rewards, beta: float, eta: float) -> Tensor:
    z = beta * won.log_ratio.sum() - beta * lost.log_ratio.sum()
    wanted = torch.sigmoid(eta * (rewards(won).sum() - rewards(lost).sum()))
    entropy = wanted * wanted.log() + (1 - wanted) * (1 - wanted).log()
    return wanted * softplus(-z) + (1 - wanted) * softplus(z) + entropy


def tgdpo(won: Response, lost: Response, *, rewards: Rewards, beta: float, alpha: float) -> Tensor:
    of_won = (beta * (1 + alpha * rewards(won)) * won.log_ratio).sum()
    of_lost = (beta * (1 - alpha * rewards(lost)) * lost.log_ratio).sum()
    return softplus(-(of_won - of_lost))


def tdpo1(won: Response, lost: Response, *, beta: float) -> Tensor:
    apart = lost.divergence.sum() - won.divergence.sum()
    return softplus(-beta * (won.log_ratio.sum() - lost.log_ratio.sum() - apart))


def tdpo2(won: Response, lost: Response, *, beta: float, alpha: float) -> Tensor:
    apart = lost.divergence.sum() - won.divergence.sum().detach()
    return softplus(-beta * (won.log_ratio.sum() - lost.log_ratio.sum() - alpha * apart))


def sepo(won: Response, lost: Response, *, gamma: float, share: float) -> Tensor:
    means = []
    for y in (won, lost):
        by_reward = sorted(enumerate(of_guidance(y).tolist()), key=lambda item: item[1], reverse=y.chosen)
        selected = [token for token, _ in by_reward[: max(1, int(share * len(by_reward)))]]
        means.append(y.policy[selected].mean())
    return softplus(-gamma * (means[0] - means[1]))


def dpo_reg(
    won: Response, lost: Response, *, rewards: Rewards, beta: float, alpha: float, weight: float | str = "detached"
) -> Tensor:
    z = beta * won.log_ratio.sum() - beta * lost.log_ratio.sum()
    regulariser = sum(-(beta * rewards(y) * y.policy).sum() for y in (won, lost))
    return softplus(-z) + alpha * _sequence_weight(z, weight) * regulariser


def simpo_reg(
    won: Response,
    lost: Response,
    *,
    rewards: Rewards,
    beta: float,
    gamma: float,
    alpha: float,
    weight: float | str = "detached",
) -> Tensor:
    z = beta * won.policy.mean() - beta * lost.policy.mean() - gamma
    regulariser = sum(-(beta * rewards(y) * y.policy).mean() for y in (won, lost))
    return softplus(-z) + alpha * _sequence_weight(z, weight) * regulariser


def _sequence_weight(z: Tensor, weight: float | str) -> Tensor | float:
    """A number is a static weight."""
    if not isinstance(weight, str):
        return weight
    return torch.sigmoid(-z).detach() if weight == "detached" else torch.sigmoid(-z)


# Which methods the matrix has.


@dataclass(frozen=True)
class Method:
    """Our settings, the same loss written out, and where its scores can come from.

    Attributes:
        scores: `live` and `cached`; `none` for a method that reads no frozen model.
        adam_eps: Added to AdamW's denominator. Where it is as small as the default, 1e-8, rounding decides the first
            step of a weight whose gradient is as near to 0: a thousandth, more than any limit here.
    """

    ours: LossConfig
    formula: Formula
    scores: tuple[str, ...] = ("live", "cached")
    adam_eps: float = 1e-5

    def adam_eps_for(self, family: str) -> float:
        """The same, for the models of a family. Other families than Llama have gradients near 0: a bias of Qwen2's keys
        changes no probability."""
        return self.adam_eps if family == "llama" else 1e-5


# Beta and gamma are such that random models leave the sigmoids unsaturated: a gradient near 0 compares nothing.
METHODS = {
    "TGDPO": Method(
        LossConfig(type="tgdpo", beta=0.1, alpha=0.5, beta_r=1.0),
        partial(tgdpo, rewards=of_guidance, beta=0.1, alpha=0.5),
        adam_eps=1e-8,  # the default; these models and pairs give it no such gradient
    ),
    "SFT": Method(LossConfig(type="sft"), sft, ("none",)),
    "SimPO": Method(
        LossConfig(type="simpo", beta=2.5, gamma_beta_ratio=0.55), partial(simpo, beta=2.5, gamma=1.375), ("none",)
    ),
    "cDPO": Method(LossConfig(type="dpo", beta=0.1, label_smoothing=0.2), partial(dpo, beta=0.1, epsilon=0.2)),
    "robust DPO": Method(
        LossConfig(type="robust", beta=0.1, label_smoothing=0.2), partial(robust, beta=0.1, epsilon=0.2)
    ),
    "hinge": Method(LossConfig(type="hinge", beta=0.1), partial(hinge, beta=0.1)),
    "IPO": Method(LossConfig(type="ipo", beta=0.5), partial(ipo, beta=0.5)),
    "IPO of sums": Method(LossConfig(type="ipo_sum", beta=0.1), partial(ipo_sum, beta=0.1)),
    "length-normalised DPO": Method(LossConfig(type="dpo_norm", beta=2.0), partial(dpo_norm, beta=2.0)),
    "DPO with NLL": Method(LossConfig(type="dpo", beta=0.1, sft_loss_weight=0.3), partial(dpo, beta=0.1, nll=0.3)),
    "TDPO1": Method(LossConfig(type="tdpo1", beta=0.1), partial(tdpo1, beta=0.1), ("live",)),
    "TDPO2": Method(LossConfig(type="tdpo2", beta=0.1, alpha=0.5), partial(tdpo2, beta=0.1, alpha=0.5), ("live",)),
    "SePO": Method(LossConfig(type="sepo", gamma=2.1, selected_share=0.3), partial(sepo, gamma=2.1, share=0.3)),
    "RPO": Method(
        LossConfig(type="rpo", beta=0.1, token_rewards="guidance", beta_r=0.5),
        partial(rpo, rewards=of_guidance, beta=0.1, eta=0.5),
    ),
    "DPO-REG": Method(
        LossConfig(type="dpo_reg", beta=0.1, alpha=0.25),
        partial(dpo_reg, rewards=of_contrastive_prompts, beta=0.1, alpha=0.25),
        ("cached",),
    ),
    "DPO-REG, attached": Method(
        LossConfig(
            type="dpo_reg", beta=0.1, alpha=0.25, sequence_weight="attached", token_rewards="guidance", beta_r=1.0
        ),
        partial(dpo_reg, rewards=of_guidance, beta=0.1, alpha=0.25, weight="attached"),
    ),
    "DPO-REG, static": Method(
        LossConfig(
            type="dpo_reg",
            beta=0.1,
            alpha=0.25,
            sequence_weight="static",
            static_weight=0.5,
            token_rewards="file",
            beta_r=2.0,
            reward_clip=1.5,
            reward_end_of_turn=False,
        ),
        partial(dpo_reg, rewards=partial(of_file, beta_r=2.0, limit=1.5), beta=0.1, alpha=0.25, weight=0.5),
    ),
    "SimPO-REG": Method(
        LossConfig(type="simpo_reg", beta=2.5, gamma_beta_ratio=0.55, alpha=0.25),
        partial(simpo_reg, rewards=of_contrastive_prompts, beta=2.5, gamma=1.375, alpha=0.25),
        ("cached",),
    ),
    "SimPO-REG, attached": Method(
        LossConfig(
            type="simpo_reg",
            beta=2.5,
            gamma_beta_ratio=0.55,
            alpha=0.25,
            sequence_weight="attached",
            token_rewards="guidance",
            beta_r=1.0,
        ),
        partial(simpo_reg, rewards=of_guidance, beta=2.5, gamma=1.375, alpha=0.25, weight="attached"),
    ),
    "SimPO-REG, static": Method(
        LossConfig(
            type="simpo_reg",
            beta=2.5,
            gamma_beta_ratio=0.55,
            alpha=0.25,
            sequence_weight="static",
            token_rewards="chosen",
        ),
        partial(simpo_reg, rewards=of_the_label, beta=2.5, gamma=1.375, alpha=0.25, weight=1.0),
        ("none",),
    ),
}
