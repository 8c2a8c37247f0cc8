"""Score pairs with frozen models: token log-probs written once, read by every run over the same data.

A forward-only pipeline at any layout. The reference and the guidance model run together, in one reading of
the data, through the same schedule and head as in training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from tqdm import tqdm

from tgdpo_megatron import inputs
from tgdpo_megatron.checkpoint.state import load_weights
from tgdpo_megatron.config import Config, check_fit
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.engine import pipeline_pass
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.model.build import build_model, transformer_config
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel, on_first_rank
from tgdpo_megatron.scores.store import Manifest, write_manifest, write_shard

_PAIRS_AT_ONCE = 128
"""On each data-parallel rank between progress updates: enough to fill the pipeline, few enough to see it move."""


def score(config: Config, ranks: Ranks) -> None:
    """Write the scores of data.train (and data.validation) to scores.path, on every rank.

    The reference is model.reference, or model.checkpoint; model.guidance is scored too where given.

    Raises:
        UserError: An input that cannot be used, or a log-prob that is not finite.
    """
    data_parallel_size = check_fit(config, world_size=ranks.world_size)
    models = inputs.check_models(config)
    inputs.check_stackable(config)
    folder = inputs.required(config.scores.path, "scores.path", "a folder for the scores")
    with inputs.removed_if_refused(folder, ranks):
        on_first_rank(ranks, partial(_claim_folder, folder))
        data, validation = inputs.load_data(config, models.description, ranks, folder / "data")

        initialize_model_parallel(config.parallel, config.train.seed)
        megatron = transformer_config(models.description, config)
        names, loaded = [], []
        for name, checkpoint in (("reference", config.reference_checkpoint), ("guidance", config.model.guidance)):
            if checkpoint is not None:
                names.append(name)
                loaded.append(build_model(models.description, megatron))
                load_weights(loaded[-1], checkpoint)
        for place, chunk in enumerate(loaded[0]):
            chunk.requires_grad_(False).eval()
            chunk.carry([model[place] for model in loaded[1:]])

    for part, pairs in (("train", data), ("validation", validation)):
        if pairs is None:
            continue
        work = folder / f"{part}.tmp"
        if ranks.is_first:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        dist.barrier()
        _score_pairs(config, ranks, loaded[0], pairs, names, work, data_parallel_size)
        dist.barrier()
        if ranks.is_first:
            manifest = Manifest(
                reference=models.reference.weights,
                guidance=models.guidance.weights if models.guidance else None,
                tokenizer=pairs.summary.tokenizer,
                template=pairs.summary.template,
                max_length=pairs.summary.max_length,
                pairs_hash=pairs.summary.pairs_hash,
                precision=config.train.precision,
            )
            write_manifest(work, manifest)
            work.rename(folder / part)
            print(f"scores of {len(pairs)} pairs ({', '.join(names)}): {folder / part}", flush=True)
    dist.barrier()


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """Run one micro-batch through this stage; the last stage keeps the log-probs, [k, R]."""
    return model(next(batches)), lambda logps, non_loss_data: logps


def _score_pairs(
    config: Config,
    ranks: Ranks,
    chunks: list[Any],
    data: PreparedPairs,
    names: list[str],
    folder: Path,
    data_parallel_size: int,
) -> None:
    """Score this data-parallel rank's share, writing what is done while the next is computed. Collective.

    Raises:
        UserError: On every rank, if any log-prob is not finite.
    """
    rank = parallel_state.get_data_parallel_rank()
    writes = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    writes = writes and parallel_state.get_tensor_model_parallel_rank() == 0
    progress = tqdm(total=len(data), desc="scoring", unit="pair", disable=not ranks.is_first)
    written: list[Future[str | None]] = []
    with ThreadPoolExecutor(max_workers=1) as writer:
        for number, first in enumerate(range(0, len(data), _PAIRS_AT_ONCE * data_parallel_size)):
            picked = np.arange(first, min(first + _PAIRS_AT_ONCE * data_parallel_size, len(data)))
            batches = rank_batches(
                data,
                picked,
                config,
                sides=(CHOSEN, REJECTED),
                rank=rank,
                ranks=data_parallel_size,
                device=ranks.device,
            )
            run = pipeline_pass(
                chunks,
                forward_step,
                batches,
                config,
                stacked=len(names),
                forward_only=True,
                collect_non_loss_data=True,
            )
            with torch.no_grad():
                outputs = run()
            if writes:
                shard = number * data_parallel_size + rank
                written.append(writer.submit(_write, folder, shard, data, batches, outputs, names))
            progress.update(len(picked))
    progress.close()
    bad: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(bad, next(filter(None, (shard.result() for shard in written)), None))
    if found := next(filter(None, bad), None):
        raise UserError(f"the scores of {found} are not finite; check the frozen checkpoints.")


def _write(
    folder: Path, shard: int, data: PreparedPairs, batches: list[Batch], outputs: list[Tensor], names: list[str]
) -> str | None:
    """Write the scores of some micro-batches. Returns the name of a pair whose scores are not finite, if any."""
    pairs = [pair for batch in batches for pair in batch.samples]
    lengths = np.array(
        [data.response_length(pair, 0) + data.response_length(pair, 1) for pair in pairs], dtype=np.int64
    )
    together = torch.cat(outputs, dim=1).cpu().numpy()  # [models, labelled tokens]
    bad_tokens = np.flatnonzero(~np.isfinite(together).all(axis=0))
    values = {name: np.ascontiguousarray(row) for name, row in zip(names, together, strict=True)}
    write_shard(folder, shard, data.hashes[pairs], lengths, values)
    if not len(bad_tokens):
        return None
    return data.name(pairs[int(np.searchsorted(np.cumsum(lengths), bad_tokens[0], side="right"))])


def _claim_folder(folder: Path) -> None:
    if any((folder / part).exists() for part in ("train", "validation")):
        raise UserError(f"{folder}: holds token scores already; choose another scores.path.")
    inputs.check_writable(folder)
