"""The settings of T-REG (arXiv 2412.02685).

First `python -m recipes.score --recipe NAME`: the start model under a prompt that asks for better and one that asks for
worse. Then train. What all settings share is in ultrafeedback.py. Where every value is from: docs/methods.md, "Where
the papers' values come from".
"""

from recipes.ultrafeedback import gemma2_9b, llama3_8b
from tgdpo_megatron.config import Config, LossConfig


def dpo_reg_llama3_8b() -> Config:
    """T-REG on DPO: Llama-3-8B-Instruct, pairs chosen by ArmoRM, 8 × 80 GB."""
    return llama3_8b(LossConfig(type="dpo_reg", beta=0.01, alpha=0.25), lr=3e-7)


def simpo_reg_llama3_8b() -> Config:
    """T-REG on SimPO: Llama-3-8B-Instruct, pairs chosen by ArmoRM, 8 × 80 GB."""
    return llama3_8b(LossConfig(type="simpo_reg", beta=10.0, gamma_beta_ratio=0.3, alpha=0.25), lr=1e-6)


def simpo_reg_gemma2_9b() -> Config:
    """T-REG on SimPO: Gemma-2-9B-it, pairs chosen by ArmoRM, 8 × 80 GB."""
    return gemma2_9b(LossConfig(type="simpo_reg", beta=10.0, gamma_beta_ratio=0.5, alpha=0.25), lr=8e-7)
