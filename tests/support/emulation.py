"""Which layers bench.fp8.emulation changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tgdpo_megatron.platform.processes import Ranks


def changed_layers(ranks: Ranks, *, folder: str) -> dict[str, Any]:
    """Names of the layers whose product is replaced, under a recipe and after it, and whether log-probs changed."""
    import torch

    from bench.fp8.emulation import RECIPES, emulate
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.state import load_weights
    from tgdpo_megatron.config import Config, ParallelConfig
    from tgdpo_megatron.data.attention_plan import AttentionPlan
    from tgdpo_megatron.data.batch import Batch
    from tgdpo_megatron.losses import Pairs
    from tgdpo_megatron.model.build import build_model, transformer_config
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    initialize_model_parallel(ParallelConfig(), seed=1)
    description = describe(Path(folder))
    (model,) = build_model(description, transformer_config(description, Config()))
    load_weights([model], Path(folder))
    tokens = torch.arange(16)
    batch = Batch(
        tokens=tokens,
        positions=tokens,
        plan=AttentionPlan.plain([16]),
        predictors=tokens,
        labels=tokens,
        pairs=Pairs(torch.zeros_like(tokens), torch.zeros_like(tokens), num_pairs=1),
        scores={},
        samples=(0,),
    )

    def changed() -> list[str]:
        return [name for name, layer in model.named_modules() if "_forward_impl" in vars(layer)]

    with torch.no_grad():
        plain = model(batch)
        outputs, names = [], []
        for recipe in RECIPES:
            emulate(model, recipe)
            outputs.append(model(batch))
            names.append(changed())
        emulate(model, None)
        again = model(batch)
    assert all(found == names[0] for found in names)
    return {
        "emulated": names[0],
        "taken away": changed(),
        "same again": torch.equal(plain, again),
        "differs": all(not torch.equal(plain, output) for output in outputs),
    }
