"""The settings of TGDPO (arXiv 2506.14574), each with the DPO run that makes its guidance model.

First `dpo_X`, then `python -m recipes.score --recipe tgdpo_X` with its checkpoint as model.guidance, then `tgdpo_X`,
which starts from the same model as the guidance did, not from the guidance. What all settings share is in
ultrafeedback.py. Where every value is from: docs/methods.md, "Where the papers' values come from".
"""

from recipes.ultrafeedback import gemma2_2b, llama3_8b, llama32_3b
from tgdpo_megatron.config import Config, LossConfig


def dpo_llama3_8b_pairrm() -> Config:
    """DPO, the guidance for TGDPO: Llama-3-8B-Instruct, pairs chosen by PairRM, 8 × 80 GB."""
    return llama3_8b(guidance_loss(), lr=7e-7)


def tgdpo_llama3_8b_pairrm() -> Config:
    """TGDPO: Llama-3-8B-Instruct, pairs chosen by PairRM, 8 × 80 GB."""
    return llama3_8b(tgdpo_loss(), lr=7e-7)


def dpo_llama3_8b_armorm() -> Config:
    """DPO, the guidance for TGDPO: Llama-3-8B-Instruct, pairs chosen by ArmoRM, 8 × 80 GB."""
    return llama3_8b(guidance_loss(), lr=3e-7)


def tgdpo_llama3_8b_armorm() -> Config:
    """TGDPO: Llama-3-8B-Instruct, pairs chosen by ArmoRM, 8 × 80 GB."""
    return llama3_8b(tgdpo_loss(), lr=7e-7)


def dpo_llama32_3b() -> Config:
    """DPO, the guidance for TGDPO: Llama-3.2-3B-Instruct, pairs chosen by ArmoRM, 8 × 80 GB."""
    return llama32_3b(guidance_loss(), lr=3e-7)


def tgdpo_llama32_3b() -> Config:
    """TGDPO: Llama-3.2-3B-Instruct, pairs chosen by ArmoRM, 8 × 80 GB."""
    return llama32_3b(tgdpo_loss(), lr=7e-7)


def dpo_gemma2_2b() -> Config:
    """DPO, the guidance for TGDPO: Gemma-2-2B-it, pairs chosen by ArmoRM, 8 × 80 GB."""
    return gemma2_2b(guidance_loss(), lr=5e-7)


def tgdpo_gemma2_2b() -> Config:
    """TGDPO: Gemma-2-2B-it, pairs chosen by ArmoRM, 8 × 80 GB."""
    return gemma2_2b(tgdpo_loss(), lr=7e-7)


def guidance_loss() -> LossConfig:
    return LossConfig(type="dpo", beta=0.01)


def tgdpo_loss() -> LossConfig:
    return LossConfig(type="tgdpo", beta=0.1, alpha=0.5)
