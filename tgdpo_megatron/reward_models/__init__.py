"""Reward models: programs that give every answer to a prompt a score, and pairs that are made of the scores.

    scorer = open_scorer(Path("Skywork/Skywork-Reward-V2-Llama-3.1-8B"))
    for group, scores in zip(groups, scorer.scores(groups)): ...

Three kinds are known: sequence classifiers of transformers with one label (classifier.py), ArmoRM (armorm.py) and
PairRM (pairrm.py). No code that comes with a model is run, and weights are read from safetensors alone. Importing this
loads neither torch nor transformers.
"""

from tgdpo_megatron.reward_models.opening import open_scorer
from tgdpo_megatron.reward_models.scorer import Group, Scorer

__all__ = ["Group", "Scorer", "open_scorer"]
