"""What the token-credit benchmark compares: sources of token rewards, and methods with their settings.

Settings of the losses are the published ones (tgdpo_megatron/methods.py), untuned, but for the stronger guidance that
two lines name. All methods share one learning rate, so that steps can be compared: the one of 1.5e-4 and 3e-4 with
more exact answers in the mean over DPO, SimPO, SePO and TDPO2, on the held-out pairs of TUNING_SEEDS, which no
reported number comes from. TDPO2 alone would take 3e-4; 1e-3 spoils DPO.
"""

from __future__ import annotations

from dataclasses import dataclass

from tgdpo_megatron.config import LossConfig

TUNING_SEEDS = (100, 101)

SOURCES = {
    "file": "known mistakes",
    "guidance": "DPO guidance",
    "sft_guidance": "more SFT",
    "contrastive": "contrastive prompts",
    "surprise": "start's log-prob",
    "random": "random numbers",
}
"""Where token rewards come from. The start is the noisily fine-tuned model that every method starts from.

`guidance`: log-ratio of the seed's DPO run to the start. `sft_guidance`: of as many steps of SFT on the chosen
responses. `contrastive`: log-ratio of the start under two prompts. `surprise`: log-prob under the start alone, which
knows nothing of preferences. `file` and `random` are controls: what is to be found, and nothing.
"""


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        rewards: Which of SOURCES stands behind the loss's token rewards.
        only_wrong: Of the known mistakes, only the wrong tokens have a reward, not what stands there instead.
    """

    name: str
    loss: LossConfig
    rewards: str | None = None
    only_wrong: bool = False


LEARNING_RATE = 1.5e-4

GUIDANCE = Method("DPO", LossConfig(type="dpo"))
"""It guides the others too: they use its log-ratio to the start."""

_KNOWN = LossConfig(type="tgdpo", alpha=2.0, token_rewards="file")

METHODS = (
    GUIDANCE,
    Method("SimPO", LossConfig(type="simpo")),
    Method("TGDPO, α = 0.5", LossConfig(type="tgdpo"), "guidance"),
    Method("TGDPO, α = 2", LossConfig(type="tgdpo", alpha=2.0), "guidance"),
    Method("TGDPO, α = 0.5, β_r = 1", LossConfig(type="tgdpo", beta_r=1.0), "guidance"),
    Method("DPO-REG", LossConfig(type="dpo_reg"), "contrastive"),
    Method("DPO-REG, guidance", LossConfig(type="dpo_reg", token_rewards="guidance"), "guidance"),
    Method("SimPO-REG", LossConfig(type="simpo_reg"), "contrastive"),
    Method("TDPO2", LossConfig(type="tdpo2")),
    Method("SePO", LossConfig(type="sepo"), "guidance"),
    Method("TGDPO, α = 2, known mistakes", _KNOWN, "file"),
    Method("TGDPO, α = 2, known wrong tokens only", _KNOWN, "file", only_wrong=True),
)
