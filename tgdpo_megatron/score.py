"""Score pairs with frozen models: token log-probs are written once and read by every run over the same data.

The models run forward only, in a pipeline at any layout. Only the scores that the loss needs are computed. Reference
and guidance run together in one pass over the data. For contrastive prompts, the reference runs on every response under
both prompts. Scores that the folder holds already are kept: scoring that was stopped continues where it stopped, and
new pairs are added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from tqdm import tqdm

from tgdpo_megatron import preflight, run_folder
from tgdpo_megatron.checkpoint import located
from tgdpo_megatron.checkpoint.manifest import HF, describe
from tgdpo_megatron.checkpoint.state import load_weights
from tgdpo_megatron.config import Config, check_layout, on_device
from tgdpo_megatron.config.constants import SCORED_AT_ONCE
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.tokenizer import tokenizer_for
from tgdpo_megatron.engine import reports_for_its_stage, token_logps
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.losses.rewards import GIVEN_BY
from tgdpo_megatron.model.build import HAVE_TRANSFORMER_ENGINE, build_model, settle_attention, transformer_config
from tgdpo_megatron.model.description import check_model_layout
from tgdpo_megatron.model.gpt import PreferenceGPT
from tgdpo_megatron.platform import accelerators
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel, on_first_rank
from tgdpo_megatron.report.terminal import Loudness
from tgdpo_megatron.run_lock import RunLock, take_together
from tgdpo_megatron.scores import contrastive
from tgdpo_megatron.scores.store import (
    Key,
    check_belongs,
    missing_scores,
    read_scores_manifest,
    remove_parts,
    write_scores_manifest,
    write_shard,
)
from tgdpo_megatron.scores.texts import read_texts

_PROMPTED_AT_ONCE = 1024
"""Number of pairs whose contrastive prompts are tokenised and sent to all ranks at once."""
_SHORTER = f"prompts that do not quote the response are shorter ({contrastive.DEFAULT.with_name('direct.yaml')})"
_WRITES_PENDING = 2
"""Number of shards that may wait to be written."""


@dataclass(frozen=True)
class _Part:
    """Pairs, the folder of their scores, and which responses have no scores there: name -> [2N] bool."""

    data: PreparedPairs
    folder: Path
    missing: dict[str, np.ndarray]

    def lacking(self, names: Iterable[str]) -> np.ndarray:
        """Pairs that lack any of these scores, with only one of several equal pairs. [n] int64."""
        lacking = np.zeros(2 * len(self.data), bool)
        for name in names:
            lacking |= self.missing[name]
        different = np.unique(self.data.hashes, axis=0, return_index=True)[1]
        return np.intersect1d(different, np.flatnonzero(lacking.reshape(-1, 2).any(axis=1)))


@dataclass(frozen=True)
class _Work:
    """Sequences to score, and the keys of their scores.

    Attributes:
        data, samples, sides: Which sequences to score: these sides of these pairs of `data`.
        keys: (pair, side) -> for each model in order, the key of its log-probs; None where the folder has them already.
    """

    data: PreparedPairs
    samples: np.ndarray
    sides: tuple[int, ...]
    keys: Callable[[int, int], list[Key | None]]


def score(config: Config, ranks: Ranks, loudness: Loudness = Loudness.NORMAL) -> None:
    """Write the scores that the loss needs, of data.train and data.validation, to scores.path. Called on every rank.

    Raises:
        UserError: An input cannot be used, the folder holds other scores, a log-prob is not finite, or the disk is
            full.
    """
    config = on_device(config, ranks.device.type).model_copy(deep=True)
    config.train.fixed_micro_batches = False  # prompts may be longer than any pair, and nothing is kept for backward
    config.train.fp8 = config.train.fp8_recipe = None  # only the policy computes in FP8, see docs/fp8.md
    data_parallel_size = check_layout(config, world_size=ranks.world_size)
    preflight.check_cacheable(config)
    wanted = list(config.loss.log_prob_scores)
    if not wanted:
        raise UserError(f"loss.type={config.loss.type} needs no scores of frozen models; there is nothing to compute.")
    prompts = contrastive.read_prompts(config.scores.contrastive_prompts) if "better" in wanted else None
    folder = preflight.required(config.scores.path, "scores.path", "a folder for the scores")
    if (folder / "checkpoints").exists() or (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: is a training run, not a folder of scores; choose another scores.path.")
    with run_folder.removed_if_refused(folder, is_first=ranks.is_first):
        on_first_rank(ranks, partial(run_folder.check_writable, folder))
        lock = RunLock(folder)
        take_together(lock, ranks, lock.take)
        run_folder.keep_output(folder, ranks.rank)
        commits = run_folder.kept_commits(folder)
        config, found = located.models_on_every_rank(config, ranks, commits, quiet=loudness == Loudness.QUIET)
        with located.named_as_given(config, found):
            models = preflight.check_models(config)
        checkpoints = _checkpoints(config, wanted)
        config, change = settle_attention(config, *map(describe, checkpoints.values()))
        if change and ranks.is_first:
            print(f"warning: {change}.", flush=True)
        data, validation = preflight.load_data(
            config, models.description, ranks, folder / "data", quiet=loudness == Loudness.QUIET
        )
        parts = []
        for name, pairs in {"train": data, "validation": validation}.items():
            if pairs is not None:
                opening = partial(_open_store, config, models, pairs, folder / name, wanted)
                parts.append(_Part(pairs, folder / name, on_first_rank(ranks, opening)))
        if ranks.is_first:
            settings = run_folder.keep_settings(folder, config, found)
            if loudness == Loudness.VERBOSE:
                print(settings, end="", flush=True)
            if loudness > Loudness.QUIET:
                print(accelerators.name_layers(transformer_engine=HAVE_TRANSFORMER_ENGINE), flush=True)
        running = {name: path for name, path in checkpoints.items() if _lack(parts, GIVEN_BY[name], wanted)}
        initialize_model_parallel(config.parallel, config.train.seed)
        stacks = _load_stacks(running, config)

    run = partial(_score, config, ranks, stacks, data_parallel_size, shows=loudness > Loudness.QUIET)
    for part in parts:
        plain = [name for name in running if name in wanted]
        run(part, [_plain_work(part, plain)], 2 * len(part.lacking(plain)), "scoring")
        if prompts is not None:
            longest = describe(checkpoints["reference"]).max_position_embeddings
            tokenizer = tokenizer_for(checkpoints["reference"] / HF, config.data)
            blocks = _prompted_blocks(part, tokenizer, prompts, longest)
            run(
                part,
                _contrastive_work(ranks, blocks),
                4 * len(part.lacking(contrastive.PROMPT_KINDS)),
                "scoring prompts",
            )
        if ranks.is_first:
            print(
                f"scores of {len(part.data)} pairs ({', '.join(wanted)}): {part.folder}; "
                f"{len(part.lacking(wanted))} pairs were scored now",
                flush=True,
            )
    dist.barrier()
    lock.release()


def _checkpoints(config: Config, wanted: list[str]) -> dict[str, Path]:
    """The frozen models that give these scores."""
    found = {}
    if "reference" in config.loss.frozen_models:
        found["reference"] = preflight.required(config.reference_checkpoint, "model.checkpoint", "the reference")
    if "guidance" in wanted:
        found["guidance"] = preflight.required(config.model.guidance, "model.guidance", "an aligned checkpoint")
    return found


def _lack(parts: Iterable[_Part], names: Iterable[str], wanted: list[str]) -> bool:
    return any(len(part.lacking(set(names).intersection(wanted))) for part in parts)


def _open_store(
    config: Config, models: preflight.Models, pairs: PreparedPairs, folder: Path, wanted: list[str]
) -> dict[str, np.ndarray]:
    """Begin a folder of scores, or continue one that was made in the same way. Returns which responses it lacks.

    Raises:
        UserError: The folder holds other scores, or damaged ones.
    """
    expected = preflight.scores_manifest(config, models, pairs)
    remove_parts(folder)
    if (folder / "manifest.json").is_file():
        expected = check_belongs(read_scores_manifest(folder), expected, folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty and holds no token scores; choose another scores.path.")
    folder.mkdir(exist_ok=True)
    write_scores_manifest(folder, expected)
    return missing_scores(folder, pairs, wanted)


def _plain_work(part: _Part, names: list[str]) -> _Work:
    """The pairs that lack scores of these models, with the prompts they are trained with."""

    def keys(pair: int, side: int) -> list[Key | None]:
        lacking = [part.missing[name][2 * pair + side] for name in names]
        pair_hash = part.data.hashes[pair].tobytes()
        return [Key(pair_hash, side, name) if lacks else None for name, lacks in zip(names, lacking, strict=True)]

    return _Work(part.data, part.lacking(names), (CHOSEN, REJECTED), keys)


def _contrastive_work(ranks: Ranks, blocks: Iterator[tuple[PreparedPairs, list[Key]]]) -> Iterator[_Work]:
    """The work that the first rank takes from `blocks`, on every rank. The others never use `blocks`. Collective."""
    while (block := on_first_rank(ranks, partial(next, blocks, None))) is not None:
        yield _prompted_work(*block)


def _prompted_work(data: PreparedPairs, keys: list[Key]) -> _Work:
    return _Work(data, np.arange(len(keys)), (CHOSEN,), lambda sample, side: [keys[sample]])


def _prompted_blocks(
    part: _Part, tokenizer: Any, prompts: contrastive.ContrastivePrompts, longest: int
) -> Iterator[tuple[PreparedPairs, list[Key]]]:
    """Sequences of responses under both prompts, and the keys of their scores. Responses that are too long get 0.

    Raises:
        UserError: The text of the pairs is gone, is not the text that was tokenised, or no response fits the model.
    """
    lacking = part.lacking(contrastive.PROMPT_KINDS)
    if not len(lacking):
        return
    texts = read_texts(part.data)
    lengths = {
        (part.data.hashes[pair].tobytes(), side): part.data.response_length(pair, side)
        for pair in lacking
        for side in (CHOSEN, REJECTED)
    }
    shut_out = 0
    for first in range(0, len(lacking), _PROMPTED_AT_ONCE):
        pairs = lacking[first : first + _PROMPTED_AT_ONCE].tolist()
        sequences, keys, too_long = contrastive.contrastive_sequences(
            part.data, pairs, [texts[pair] for pair in pairs], tokenizer, prompts, longest
        )
        if first == 0 and not keys and part.missing[contrastive.PROMPT_KINDS[0]].all():
            # Without this error, training would run with no token reward at all.
            write_scores_manifest(part.folder, replace(read_scores_manifest(part.folder), prompts=None))
            raise UserError(
                f"{part.data.summary.source}: under the contrastive prompts no response fits the model's {longest} "
                f"positions; {_SHORTER}."
            )
        if too_long:
            write_shard(part.folder, {key: np.zeros(lengths[key.pair, key.side], np.float32) for key in too_long})
        shut_out += len(too_long) // 2
        yield sequences, keys
    if shut_out:
        print(
            f"{shut_out} of {2 * len(lacking)} responses are too long under the contrastive prompts (more than "
            f"{longest} tokens): their token rewards are 0; {_SHORTER}.",
            flush=True,
        )


def _load_stacks(checkpoints: dict[str, Path], config: Config) -> list[list[PreferenceGPT]]:
    """Load frozen models. Those of one shape are stacked and run together. Returns this rank's chunks of each stack."""
    descriptions = [describe(folder) for folder in checkpoints.values()]
    loaded = []
    for folder, description in zip(checkpoints.values(), descriptions, strict=True):
        check_model_layout(description, config.parallel)
        chunks = build_model(description, transformer_config(description, config, trained=False))
        load_weights(chunks, folder)
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
        loaded.append(chunks)
    if any(description.differs_from(descriptions[0]) for description in descriptions):
        return loaded
    for place, chunk in enumerate(loaded[0] if loaded else []):
        chunk.carry([model[place] for model in loaded[1:]])
    return loaded[:1]


def _score(
    config: Config,
    ranks: Ranks,
    stacks: list[list[PreferenceGPT]],
    data_parallel_size: int,
    part: _Part,
    works: Iterable[_Work],
    sequences: int,
    words: str,
    *,
    shows: bool,
) -> None:
    """Score this data-parallel rank's share, and write finished scores while the next are computed. Collective.

    Raises:
        UserError: On every rank, if any log-prob is not finite, or a shard cannot be written.
    """
    writes = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    writes = writes and reports_for_its_stage()
    progress = tqdm(total=sequences, desc=words, unit="response", disable=not (shows and ranks.is_first and sequences))
    pending: deque[Future[str | None]] = deque()
    with ThreadPoolExecutor(max_workers=1) as writer, progress:
        for work in works:
            for picked in _rounds(work.samples, SCORED_AT_ONCE * data_parallel_size):
                batches = rank_batches(
                    work.data,
                    picked,
                    config,
                    sides=work.sides,
                    rank=parallel_state.get_data_parallel_rank(),
                    ranks=data_parallel_size,
                    device=ranks.device,
                    context_rank=parallel_state.get_context_parallel_rank(),
                )
                outputs = _log_probs(stacks, batches, config)
                if writes:
                    pending.append(writer.submit(_write, part.folder, work, batches, outputs))
                _end_together(_finished(pending, most=_WRITES_PENDING))
                progress.update(len(picked) * len(work.sides))
        _end_together(_finished(pending, most=0))


def _rounds(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for first in range(0, len(samples), size):
        yield samples[first : first + size]


def _log_probs(stacks: list[list[PreferenceGPT]], batches: list[Batch], config: Config) -> list[Tensor]:
    """Log-probs of each micro-batch, [models, R], on the last stage; empty elsewhere. Collective."""
    found = [token_logps(chunks, batches, config) for chunks in stacks]
    return [torch.cat(logps) for logps in zip(*found, strict=True)]


def _finished(pending: deque[Future[str | None]], *, most: int) -> str | None:
    """Wait until at most `most` writes are pending, and drop the finished ones. Returns what went wrong, if any."""
    said = None
    while pending and (len(pending) > most or pending[0].done()):
        result = pending.popleft().result()
        said = said or result
    return said


def _end_together(said: str | None) -> None:
    """Raise an error on every rank if any rank has one. Collective."""
    all_said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_said, said)
    if first := next(filter(None, all_said), None):
        raise UserError(first)


def _write(folder: Path, work: _Work, batches: list[Batch], outputs: list[Tensor]) -> str | None:
    """Write the scores of some micro-batches. Returns a sentence if they are not finite or cannot be written.

    Args:
        outputs: Log-probs of each micro-batch. Each [models, R].
    """
    scores: dict[Key, np.ndarray] = {}
    for batch, output in zip(batches, outputs, strict=True):
        rows, start = output.cpu().numpy(), 0
        for sample in batch.samples:
            for side in work.sides:
                end = start + work.data.response_length(sample, side)
                for key, row in zip(work.keys(sample, side), rows[:, start:end], strict=True):
                    if not np.isfinite(row).all():
                        return f"the scores of {work.data.name(sample)} are not finite; check the frozen checkpoints."
                    if key is not None:
                        scores[key] = row
                start = end
    try:
        if scores:
            write_shard(folder, scores)
    except OSError as error:
        return f"{folder}: the scores cannot be written ({error.strerror}); what was written before is kept."
    return None
