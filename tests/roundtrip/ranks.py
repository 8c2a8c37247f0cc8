"""One rank of a layout: the log-probs that the converted models give there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.roundtrip.models import token_ids


def score(ranks: Any, *, parallel: dict[str, Any], checkpoints: list[str]) -> list[list[float]]:
    """Log-probs of the tokens after the first, for each checkpoint. Collective."""
    import torch.distributed as dist

    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.checkpoint.state import load_weights
    from tgdpo_megatron.config import Config
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.data.prepare import PreparedPairs, Summary
    from tgdpo_megatron.engine import token_logps
    from tgdpo_megatron.losses import CHOSEN
    from tgdpo_megatron.model.build import build_model, transformer_config
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    config = Config.model_validate({"parallel": parallel, "train": {"precision": "fp32"}})
    initialize_model_parallel(config.parallel, seed=1)
    ids = np.asarray(token_ids(), dtype=np.int32)
    pair = PreparedPairs(
        tokens=ids,
        starts=np.asarray([0, len(ids), len(ids)], dtype=np.int64),
        prompt_lengths=np.ones(1, dtype=np.int32),
        hashes=np.zeros((1, 32), dtype=np.uint8),
        rows=np.zeros(1, dtype=np.int64),
        summary=Summary(source="random"),
    )
    results = []
    for folder in map(Path, checkpoints):
        description = describe(folder)
        chunks = build_model(description, transformer_config(description, config))
        load_weights(chunks, folder)
        batch = make_batch(pair, [0], sides=(CHOSEN,), align=config.token_multiple)
        found = token_logps(chunks, [batch], config)
        everyone: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(everyone, found[0][0].tolist() if found else None)
        results.append(next(logps for logps in everyone if logps is not None))
    return results
