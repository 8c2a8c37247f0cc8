"""Gradients that are divided by the number of pairs here, beside those that Megatron divides itself."""

from __future__ import annotations

from pathlib import Path

import torch

from tgdpo_megatron.config import Config, LossConfig, TrainConfig
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel


def compare(ranks: Ranks, *, folder: str) -> dict[str, dict[str, bool]]:
    """For a step in which ranks have different numbers of pairs, and for one without any: what holds on this rank."""
    from megatron.core.distributed import finalize_model_grads

    from bench.pairs import ultrafeedback_like
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.pair_losses import PreferenceLoss

    checkpoint = Path(folder)
    config = Config(loss=LossConfig(type="dpo"), train=TrainConfig(precision="fp32", train_iters=2))
    initialize_model_parallel(config.parallel, seed=1)
    description, loss = describe(checkpoint), PreferenceLoss(config)
    engine = build_engine(config, description, loss=loss, start=checkpoint, frozen=[checkpoint])
    data = ultrafeedback_like(3, longest=64, vocabulary=description.vocab_size)
    settings = engine.chunks[0].config
    ours = settings.finalize_model_grads_func
    found = {}
    for name, picked in {"pairs": [[0, 1], [2]][ranks.rank], "none": []}.items():
        gradients = []
        for finalize in (ours, finalize_model_grads):
            settings.finalize_model_grads_func = finalize
            engine.zero_grad()
            engine.forward_backward([make_batch(data, picked)])
            gradients.append(torch.cat([buffer.grad_data.clone() for buffer in engine.policy[0].buffers]))
        first, second = gradients
        found[name] = {
            "same bits": bool((first.view(torch.int32) == second.view(torch.int32)).all()),
            "zero": not first.any(),
            "finite": bool(first.isfinite().all()),
        }
    settings.finalize_model_grads_func = ours
    return found
