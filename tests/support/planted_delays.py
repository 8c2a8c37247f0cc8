"""Steps in which one rank, or one frozen model, is made slow: the clock must say which."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from tgdpo_megatron.config import Config, LossConfig, ScoresConfig, TrainConfig
from tgdpo_megatron.platform.clock import READING
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel


def spent(ranks: Ranks, *, folder: str, steps: int, in_reading: float, in_reference: float) -> dict[str, Any]:
    """Seconds of each activity, those that each rank waited, and how many barriers there were.

    Also how many passes of the reference were done, over all ranks, when the votes of the last step were asked for.

    Args:
        in_reading: Seconds by which the last rank is late in each step.
        in_reference: Seconds by which the reference's forward pass is slow on every rank.
    """
    import torch.distributed as dist

    from bench.pairs import ultrafeedback_like
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.pair_losses import PreferenceLoss

    checkpoint = Path(folder)
    description = describe(checkpoint)
    config = Config(
        loss=LossConfig(type="dpo"),
        scores=ScoresConfig(source="live"),
        train=TrainConfig(precision="bf16" if ranks.device.type == "cuda" else "fp32", train_iters=steps + 1),
    )
    initialize_model_parallel(config.parallel, seed=1)
    engine = build_engine(config, description, loss=PreferenceLoss(config), start=checkpoint, frozen=[checkpoint])
    data = ultrafeedback_like(2, longest=64, vocabulary=description.vocab_size)
    barriers, barrier = [], dist.barrier
    passes: list[float] = []

    def counted(*arguments: Any, **settings: Any) -> None:
        barriers.append(arguments)
        barrier(*arguments, **settings)

    (reference,) = engine.chunks[0].frozen
    decode = reference.decode

    def slow(*arguments: Any) -> Any:
        time.sleep(in_reference)
        passes.append(in_reference)
        return decode(*arguments)

    for step in range(steps + 1):
        if step == 1:  # the first warms up
            reference.decode, dist.barrier = slow, counted  # type: ignore[method-assign]
            engine.clock.restart()
            began = time.monotonic()
        with engine.clock.during(READING):
            batches = [make_batch(data, np.arange(2)).to(ranks.device)]
            if step and ranks.rank == ranks.world_size - 1:
                time.sleep(in_reading)
        engine.zero_grad()
        totals = engine.forward_backward(batches, lambda: {"passes": len(passes)})
        engine.update()
    dist.barrier = barrier
    found = engine.time_spent()
    whole = time.monotonic() - began
    return {
        "seconds": found.seconds,
        "waiting": found.waiting,
        "barriers": len(barriers),
        "whole": whole,
        "passes": totals["passes"],
    }
