"""What megatron-core does with two settings that gave wrong numbers in silence before 0.18."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tgdpo_megatron.config import Config, load
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel


def gradient_norms(ranks: Ranks, *, folder: str) -> list[float]:
    """Of one interleaved pass, with a stage's outputs kept and with them freed once they are handed over."""
    from bench.pairs import ultrafeedback_like
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.pair_losses import PreferenceLoss

    config = _config({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2})
    initialize_model_parallel(config.parallel, seed=1)
    description = replace(describe(Path(folder)), num_layers=4)
    engine = build_engine(config, description, loss=PreferenceLoss(config), start=None, frozen=[])
    data = ultrafeedback_like(8, longest=64, vocabulary=description.vocab_size)
    batches = [make_batch(data, [pair], sides=config.loss.method.sides).to(ranks.device) for pair in range(8)]
    norms = []
    for freed in (False, True):
        for chunk in engine.chunks:
            chunk.config.deallocate_pipeline_outputs = freed
        engine.zero_grad()
        engine.forward_backward(batches)
        norms.append(engine.gradient_norm())
    return norms


def marked_weights(ranks: Ranks, *, folder: str) -> list[dict[str, bool]]:
    """Weight -> whether it is marked as split over tensor-parallel ranks: initialised, and not initialised."""
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.model.build import build_model, transformer_config

    config = _config({"tensor_model_parallel_size": 2})
    initialize_model_parallel(config.parallel, seed=1)
    description = describe(Path(folder))
    megatron = transformer_config(description, config)
    found = []
    for initialised in (True, False):
        megatron.perform_initialization = initialised
        (model,) = build_model(description, megatron)
        found.append({name: _marked(weight) for name, weight in model.named_parameters()})
    return found


def _marked(weight: torch.nn.Parameter) -> bool:
    return bool(getattr(weight, "tensor_model_parallel", False))


def _config(parallel: dict[str, Any]) -> Config:
    settings = {"parallel": parallel, "loss": {"type": "sft"}, "train": {"train_iters": 1}}
    return load(Config(), settings, where="test")


def reduced_gradients(ranks: Ranks) -> dict[str, float | str]:
    """What an element of a gradient of 1 on each of two ranks becomes, contiguous in memory or not."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    from tgdpo_megatron.model.head import labelled_states

    initialize_model_parallel(_config({"tensor_model_parallel_size": 2}).parallel, seed=1)
    group = parallel_state.get_tensor_model_parallel_group()
    states = torch.ones(4, 1, 8, device=ranks.device, requires_grad=True)

    def reduced(output: torch.Tensor, *, contiguous: bool) -> float | str:
        states.grad = None
        gradient = torch.ones(4, 8, device=ranks.device)  # it may be reduced in place
        try:
            output.backward(gradient if contiguous else gradient.t().contiguous().t())
        except AssertionError:
            return "refused"
        assert states.grad is not None
        return float(states.grad.max())

    def megatrons() -> torch.Tensor:
        copied: torch.Tensor = copy_to_tensor_model_parallel_region(states.squeeze(1), group=group)
        return copied

    def ours() -> torch.Tensor:
        return labelled_states(states, torch.arange(4, device=ranks.device), False, group)

    return {
        "Megatron's, contiguous": reduced(megatrons(), contiguous=True),
        "Megatron's": reduced(megatrons(), contiguous=False),
        "ours, contiguous": reduced(ours(), contiguous=True),
        "ours": reduced(ours(), contiguous=False),
    }
