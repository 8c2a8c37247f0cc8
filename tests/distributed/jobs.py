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


def distribution(ranks: Ranks, *, folder: str, ids: list[int], parallel: dict[str, Any], output: str) -> None:
    """Save a checkpoint's log-probs of the whole vocabulary after each of some tokens, [tokens, vocabulary]."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.state import load_weights
    from tgdpo_megatron.config import ParallelConfig
    from tgdpo_megatron.data.batch import Batch
    from tgdpo_megatron.losses import Pairs
    from tgdpo_megatron.model.build import build_model, transformer_config
    from tgdpo_megatron.platform.processes import initialize_model_parallel
    from tgdpo_megatron.score import forward_step

    layout = ParallelConfig(**parallel)
    initialize_model_parallel(layout, seed=1)
    description = describe(Path(folder))
    chunks = build_model(description, transformer_config(description, layout, precision="fp32"))
    load_weights(chunks, Path(folder))
    vocab = description.vocab_size
    rows = torch.arange(len(ids)).repeat_interleave(vocab)  # every token of the vocabulary is a label of every row
    batch = Batch(
        tokens=torch.tensor(ids),
        positions=torch.arange(len(ids)),
        segment_lengths=(len(ids),),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        rows=rows,
        labels=torch.arange(vocab).repeat(len(ids)),
        pairs=Pairs(torch.zeros_like(rows), torch.zeros_like(rows), num_pairs=1),
        reference=None,
        guidance=None,
        samples=(0,),
    )
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter([batch]) for _ in chunks],
            model=chunks,
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        torch.save(outputs[0][0].view(len(ids), vocab), output)
    parallel_state.destroy_model_parallel()


def train_and_look(ranks: Ranks, *, recipe: str, job: dict[str, Any], looks: list[dict[str, Any]]) -> None:
    """Train, then save distributions of the result and of other checkpoints."""
    train_all(ranks, recipe=recipe, jobs=[job])
    for look in looks:
        distribution(ranks, **look)
