"""Three of the four settings of TGDPO (arXiv 2506.14574), each with the DPO run that makes its guidance model.

First `dpo_X`, then `python -m recipes.score --recipe tgdpo_X` with its checkpoint as model.guidance, then `tgdpo_X`,
which starts from the same model as the guidance did, not from the guidance. "YAML" is the one configuration that the
authors publish, of Llama-3-8B-Instruct with PairRM; "notes" are summaries of the paper, which was not at hand in full.
What all settings share, and the layouts, are in ultrafeedback.py.

TGDPO runs:

- beta 0.1, alpha 0.5, lr 7e-7: YAML. Paper and code disagree: the notes give beta 0.01. There a token's weight is
  1 ± 0.005 times the guidance's log-ratio, which is nearly DPO; for it, set loss.beta=0.01.
- beta_r is beta, as in the authors' code, which scales r̂ by the beta in training and not by the guidance's own.
- alpha 0.5, 1 and 2 are in the notes: larger ones only converge faster (best at the end, at step 60 and at step 50).
- Nothing is published of the other settings; they take the YAML's values.

Guidance runs:

- beta 0.01: notes. The main result is the one with that guidance (43.9 AlpacaEval 2; with beta 0.1 42.8).
- lr: SimPO's README, best for DPO: 7e-7 for PairRM's pairs ("Llama3-Instruct"), 3e-7 for ArmoRM's ("v0.2"). It has no
  other Llama: 3e-7 for Llama-3.2-3B is derived (ArmoRM's pairs).
- The authors' own `stage: dpo` is no DPO: a function changed for TGDPO turned it into a mean over token places.

The authors' template for Llama-3.2 differs from the tokenizer's own, which is used here: theirs has no system turn.
The fourth setting, Gemma-2-2B-it, has no recipe: that family of models is not supported yet.
"""

from recipes.ultrafeedback import llama3_8b, llama32_3b
from tgdpo_megatron.config import Config, LossConfig


def dpo_llama3_8b_pairrm() -> Config:
    """Guidance for Llama-3-8B-Instruct, PairRM. beta: notes; lr: SimPO's README."""
    return llama3_8b(_guidance(), lr=7e-7)


def tgdpo_llama3_8b_pairrm() -> Config:
    """Llama-3-8B-Instruct, pairs chosen by PairRM. All values: YAML (the notes give beta 0.01)."""
    return llama3_8b(_tgdpo(), lr=7e-7)


def dpo_llama3_8b_armorm() -> Config:
    """Guidance for Llama-3-8B-Instruct, ArmoRM. beta: notes; lr: SimPO's README."""
    return llama3_8b(_guidance(), lr=3e-7)


def tgdpo_llama3_8b_armorm() -> Config:
    """Llama-3-8B-Instruct, pairs chosen by ArmoRM. Values of the YAML, which is of PairRM's."""
    return llama3_8b(_tgdpo(), lr=7e-7)


def dpo_llama32_3b() -> Config:
    """Guidance for Llama-3.2-3B-Instruct, ArmoRM. beta: notes; lr: derived from SimPO's README."""
    return llama32_3b(_guidance(), lr=3e-7)


def tgdpo_llama32_3b() -> Config:
    """Llama-3.2-3B-Instruct, pairs chosen by ArmoRM. Values of the YAML, which is of Llama-3-8B's."""
    return llama32_3b(_tgdpo(), lr=7e-7)


def _guidance() -> LossConfig:
    return LossConfig(type="dpo", beta=0.01)


def _tgdpo() -> LossConfig:
    return LossConfig(type="tgdpo", beta=0.1, alpha=0.5)
