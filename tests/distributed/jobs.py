"""Whole training jobs in one set of ranks: Python start-up is paid once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.settings import RECIPES
from tgdpo_megatron.config import load
from tgdpo_megatron.platform.processes import Ranks


def train_all(ranks: Ranks, *, recipe: str, jobs: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """Run training jobs one after another; return the metrics of each."""
    import json

    from megatron.core import parallel_state

    from tgdpo_megatron.train import train

    metrics = []
    for changes in jobs:
        train(load(RECIPES[recipe](), changes, where="test"), ranks)
        parallel_state.destroy_model_parallel()
        lines = (Path(changes["train"]["output"]) / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line) for line in lines])
    return metrics


def score_and_train(ranks: Ranks, *, recipe: str, scoring: dict[str, Any], jobs: list[dict[str, Any]]) -> Any:
    """Score once, then train; return the metrics of each job."""
    from megatron.core import parallel_state

    from tgdpo_megatron.score import score

    score(load(RECIPES[recipe](), scoring, where="test"), ranks)
    parallel_state.destroy_model_parallel()
    return train_all(ranks, recipe=recipe, jobs=jobs)
