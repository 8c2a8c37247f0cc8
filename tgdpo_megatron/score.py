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

from tgdpo_megatron import inputs, run_folder
from tgdpo_megatron.checkpoint.manifest import describe
from tgdpo_megatron.checkpoint.state import load_weights
from tgdpo_megatron.config import Config, check_batch_layout
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.engine import pipeline_pass
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.model.build import build_model, transformer_config
from tgdpo_megatron.model.description import check_model_layout
from tgdpo_megatron.model.gpt import PreferenceGPT
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel, on_first_rank
from tgdpo_megatron.scores.store import write_scores_manifest, write_shard

_PAIRS_AT_ONCE = 128
"""On each data-parallel rank between progress updates: enough to fill the pipeline, few enough to see it move."""


def score(config: Config, ranks: Ranks) -> None:
    """Write the scores of data.train (and data.validation) to scores.path, on every rank.

    The reference is model.reference, or model.checkpoint; model.guidance is scored too where given.

    Raises:
        UserError: An input that cannot be used, or a log-prob that is not finite.
    """
    data_parallel_size = check_batch_layout(config, world_size=ranks.world_size)
    models = inputs.check_models(config)
    folder = inputs.required(config.scores.path, "scores.path", "a folder for the scores")
    reference = inputs.required(config.reference_checkpoint, "model.checkpoint", "the reference")
    checkpoints = {"reference": reference} | ({"guidance": config.model.guidance} if config.model.guidance else {})
    with run_folder.removed_if_refused(folder, is_first=ranks.is_first):
        on_first_rank(ranks, partial(_claim_folder, folder))
        data, validation = inputs.load_data(config, models.description, ranks, folder / "data")
        initialize_model_parallel(config.parallel, config.train.seed)
        stacks = _load_stacks(checkpoints, config)

    for part, pairs in (("train", data), ("validation", validation)):
        if pairs is None:
            continue
        work = folder / f"{part}.tmp"
        if ranks.is_first:
            shutil.rmtree(work, ignore_errors=True)
        with run_folder.removed_if_refused(work, is_first=ranks.is_first):
            if ranks.is_first:
                work.mkdir()
            dist.barrier()
            _score_pairs(config, ranks, stacks, pairs, list(checkpoints), work, data_parallel_size)
        dist.barrier()
        if ranks.is_first:
            write_scores_manifest(work, inputs.scores_manifest(config, models, pairs))
            work.rename(folder / part)
            print(f"scores of {len(pairs)} pairs ({', '.join(checkpoints)}): {folder / part}", flush=True)
    dist.barrier()


def _load_stacks(checkpoints: dict[str, Path], config: Config) -> list[list[PreferenceGPT]]:
    """Load frozen models; those of one shape are stacked and run as one. This rank's chunks of each stack."""
    descriptions = [describe(folder) for folder in checkpoints.values()]
    loaded = []
    for folder, description in zip(checkpoints.values(), descriptions, strict=True):
        check_model_layout(description, config.parallel)
        chunks = build_model(description, transformer_config(description, config))
        load_weights(chunks, folder)
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
        loaded.append(chunks)
    if any(description.differs_from(descriptions[0]) for description in descriptions):
        return loaded
    for place, chunk in enumerate(loaded[0]):
        chunk.carry([model[place] for model in loaded[1:]])
    return loaded[:1]


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    """Run one micro-batch through this stage; the last stage keeps the log-probs, [k, R]."""
    return model(next(batches)), lambda logps, non_loss_data: logps


def _score_pairs(
    config: Config,
    ranks: Ranks,
    stacks: list[list[PreferenceGPT]],
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
            passes = [
                pipeline_pass(
                    chunks,
                    forward_step,
                    batches,
                    config,
                    stacked=1 + len(chunks[0].frozen),
                    forward_only=True,
                    collect_non_loss_data=True,
                )
                for chunks in stacks
            ]
            with torch.no_grad():
                outputs = [torch.cat(logps) for logps in zip(*(run() for run in passes), strict=True)]
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
    run_folder.check_writable(folder)
