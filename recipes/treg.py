"""T-REG (arXiv 2412.02685) on Llama-3-8B-Instruct, pairs chosen by ArmoRM.

First `python -m recipes.score --recipe NAME`: the start model under a prompt that asks for better and one that asks for
worse. Then train. The authors' repository was not available, and of the paper only summaries ("notes"); what all
settings share, and the layouts, are in ultrafeedback.py.

- alpha 0.25: notes give the search, 0.1, 0.25 and 0.5, not which was best for which model; the middle one is ours.
- beta, gamma_beta_ratio, lr: SimPO's best, says the paper by the notes, so the values are those of SimPO's README:
  "Llama3-Instruct v0.2".
- Rewards σ(log π_better − log π_worse) − ½, and the sequence weight σ(−z), are published; that no gradient goes through
  the weight, and the margin γ inside it for SimPO, are derived. The prompts' wording is ours.
"""

from recipes.ultrafeedback import llama3_8b
from tgdpo_megatron.config import Config, LossConfig


def dpo_reg_llama3_8b() -> Config:
    """DPO-REG on Llama-3-8B-Instruct. alpha: ours of the search; the others: SimPO's README, best for DPO."""
    return llama3_8b(LossConfig(type="dpo_reg", beta=0.01, alpha=0.25), lr=3e-7)


def simpo_reg_llama3_8b() -> Config:
    """SimPO-REG on Llama-3-8B-Instruct. alpha: ours of the search; the others: SimPO's README."""
    return llama3_8b(LossConfig(type="simpo_reg", beta=10.0, gamma_beta_ratio=0.3, alpha=0.25), lr=1e-6)
