"""Train a policy on preference pairs: one program, from top to bottom.

check every input → build this rank's part of the models → for each step: the Megatron schedule runs all
micro-batches, :func:`preference_loss` turns token log-probs into a sum over pairs, Megatron divides the
gradients once by the global number of pairs, AdamW moves the weights.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor
from tqdm import tqdm

from tgdpo_megatron import preflight, run_folder
from tgdpo_megatron.checkpoint.manifest import CheckpointManifest, read_manifest
from tgdpo_megatron.checkpoint.state import load_training_state, save_checkpoint
from tgdpo_megatron.config import Config, check_batch_layout
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.order import global_batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.engine import Engine, build_engine
from tgdpo_megatron.errors import NonFiniteError, UserError
from tgdpo_megatron.losses import CHOSEN, REJECTED, Formula, formula, inputs_of
from tgdpo_megatron.platform.checks import check_fp8
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel, on_first_rank
from tgdpo_megatron.report.metrics import Logger, add_up, averages, micro_batch_sums, names_for

EVALUATED_AT_ONCE = 1024
"""Validation pairs whose batches are in memory together, over all ranks."""


def train(config: Config, ranks: Ranks) -> None:
    """Run one training job, on every rank.

    Raises:
        UserError: An input that cannot be used; nothing has been written then.
        NonFiniteError: A loss or gradient that is not finite; the last good checkpoint is kept.
    """
    # Everything that can be wrong with the inputs is found here, before a model is built.
    data_parallel_size = check_batch_layout(config, world_size=ranks.world_size)
    check_fp8(config.train)
    checkpoint = preflight.required(
        config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from"
    )
    models = preflight.check_models(config)
    frozen = preflight.carried_checkpoints(config)
    output = preflight.required(config.train.output, "train.output", "a folder for this run")
    with run_folder.removed_if_refused(output, is_first=ranks.is_first):
        start = on_first_rank(ranks, partial(run_folder.check_output, output, config))
        run_folder.keep_output(output, ranks.rank)
        data, validation = preflight.load_data(config, models.description, ranks, output / "data")
        if config.train.global_batch_size > len(data):
            raise UserError(
                f"train.global_batch_size={config.train.global_batch_size} is more than the {len(data)} pairs of "
                f"{config.data.train}; lower it."
            )
        scores, validation_scores = preflight.load_scores_of(config, models, data, validation)
        identity = _identity(config, models, data, scores)
        run_folder.check_continues(start, config, identity)
        # This rank's part of the models.
        initialize_model_parallel(config.parallel, config.train.seed)
        engine = build_engine(config, models.description, start=None if start else checkpoint, frozen=frozen)
        first = 0
        if start is not None:
            load_training_state(start, engine.chunks, engine.optimizer, engine.scheduler)
            first = read_manifest(start).iteration or 0
    if ranks.is_first:
        run_folder.record(output, config, start)

    # What each micro-batch goes through, and which rank counts it.
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    counts_here = last_stage and parallel_state.get_tensor_model_parallel_rank() == 0
    step = partial(forward_step, config=config, formula=formula(config.loss))
    add = partial(add_up, names=names_for(config.loss), counts_here=counts_here, device=ranks.device)
    cut = partial(
        rank_batches,
        config=config,
        sides=(CHOSEN,) if config.loss.type == "sft" else (CHOSEN, REJECTED),
        rank=parallel_state.get_data_parallel_rank(),
        ranks=data_parallel_size,
        device=ranks.device,
    )
    evaluate = partial(_evaluate, engine, step, cut, add, output, data=validation, scores=validation_scores)
    due = partial(_due, last=config.train.train_iters)
    logger = Logger(output, active=ranks.is_first, first=first)
    progress = tqdm(
        range(first, config.train.train_iters),
        initial=first,
        total=config.train.train_iters,
        desc=config.loss.type,
        disable=not ranks.is_first,
        unit="step",
        mininterval=1,
    )

    for iteration in progress:
        started = time.monotonic()
        picked = global_batch(
            iteration,
            num_pairs=len(data),
            global_batch_size=config.train.global_batch_size,
            seed=config.train.seed,
            shuffle=config.data.shuffle,
        )
        micro_batches = cut(data, picked, scores=scores)
        if iteration == first and config.train.fp8_recipe == "delayed":
            engine.find_scales(step, micro_batches)
        engine.zero_grad()
        totals = add(engine.over(step, micro_batches)())
        where = f"step {iteration + 1} ({_name_samples(data, picked)})"
        _check_finite(totals, f"the loss of {where}", output)
        grad_norm, learning_rate = engine.update()
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"the gradient of {where} is not finite; {run_folder.what_is_kept(output)}.")

        metrics = averages(totals) | {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_tokens": totals["tokens"],
            "num_padding_tokens": totals["padding"],
            "perf/seconds_per_step": time.monotonic() - started,
        }
        done = iteration + 1
        for sentence in logger.new_warnings(config.loss, metrics):
            progress.write(f"warning: step {done}: {sentence}")
        evaluated = evaluate(where) if due(done, config.train.eval_interval) else {}
        metrics |= evaluated
        if evaluated or due(done, config.train.log_interval):
            logger.log(done, metrics)
            progress.set_postfix_str(_headline(metrics), refresh=False)
        if due(done, config.train.save_interval):
            # Finite weights can still be useless: one forward pass tells before they are kept as a result.
            with torch.no_grad():
                after = add(engine.over(step, micro_batches, forward_only=True)())
            _check_finite(after, f"the loss after {where}", output)
            engine.gather_weights()
            save_checkpoint(
                output / "checkpoints" / f"iter-{done:07d}",
                engine.chunks,
                engine.optimizer,
                engine.scheduler,
                companions=checkpoint,
                manifest=replace(identity, iteration=done),
            )
    logger.close()
    if ranks.is_first:
        print(f"done: {run_folder.newest_checkpoint(output)}", flush=True)


def forward_step(batches: Iterator[Batch], model: Any, *, config: Config, formula: Formula) -> tuple[Tensor, Any]:
    """Run one micro-batch through this stage; return its output and how the last stage turns it into a loss."""
    batch = next(batches)
    return model(batch), partial(preference_loss, batch=batch, config=config, formula=formula)


def preference_loss(
    logps: Tensor, *, batch: Batch, config: Config, formula: Formula
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over pairs, number of pairs, sums to report: Megatron divides once, by the pairs of all ranks.

    Args:
        logps: Token log-probs, nats: the policy's, then those of carried models, then the divergence if the method
            reads it. [k, R] fp32; the policy's and the divergence carry gradient.
    """
    policy, *live = logps
    riding = config.loss.carried if config.scores.source == "live" else ()
    names = (*riding, *(name for name in config.loss.method.reads if name == "divergence"))
    scores = batch.scores | dict(zip(names, live, strict=True))
    inputs = inputs_of(config.loss, batch.pairs, **scores)
    losses, margins = formula(policy, batch.pairs, **inputs)
    sums = micro_batch_sums(
        config.loss, batch.pairs, policy.detach(), inputs, losses.detach(), margins.detach(), padding=batch.padding
    )
    pairs = torch.full((), batch.pairs.num_pairs, dtype=torch.int, device=logps.device)
    return losses.sum(), pairs, sums


def _due(done: int, interval: int, *, last: int) -> bool:
    """Whether something is to be done after this many steps: every `interval` (0: never), and after the last."""
    return done == last or (interval > 0 and done % interval == 0)


def _evaluate(
    engine: Engine,
    step: Callable[..., Any],
    cut: Callable[..., list[Batch]],
    add: Callable[..., dict[str, float]],
    output: Path,
    where: str,
    *,
    data: PreparedPairs | None,
    scores: TokenScores | None,
) -> dict[str, float]:
    """Metrics over all validation pairs, named eval/…; empty without validation pairs. Collective."""
    if data is None:
        return {}
    totals: dict[str, float] = {}
    with torch.no_grad():
        for first in range(0, len(data), EVALUATED_AT_ONCE):
            picked = np.arange(first, min(first + EVALUATED_AT_ONCE, len(data)))
            part = add(engine.over(step, cut(data, picked, scores=scores), forward_only=True)())
            totals = {name: totals.get(name, 0.0) + value for name, value in part.items()}
    _check_finite(totals, f"the validation loss after {where}", output)
    return {f"eval/{name}": value for name, value in averages(totals).items()}


def _check_finite(totals: dict[str, float], what: str, output: Path) -> None:
    if totals["not_finite"] or not all(map(math.isfinite, totals.values())):
        raise NonFiniteError(f"{what} is not finite; {run_folder.what_is_kept(output)}.")


def _identity(
    config: Config, models: preflight.Models, data: PreparedPairs, scores: TokenScores | None
) -> CheckpointManifest:
    """What the run's checkpoints say of themselves, but for weights and iteration."""
    guidance = models.guidance.weights if models.guidance else None
    if guidance is None and scores is not None and scores.manifest is not None:
        guidance = scores.manifest.guidance
    rewards = scores.manifest.prompts if scores is not None and scores.manifest is not None else None
    if "reward" in config.loss.scores and config.scores.reward_file is not None:
        rewards = hashlib.sha256(config.scores.reward_file.read_bytes()).hexdigest()
    return CheckpointManifest(
        weights="",
        dtype="bfloat16" if config.train.precision == "bf16" else "float32",
        tokenizer=models.policy.tokenizer,
        template=models.policy.template,
        reference=models.reference.weights if "reference" in config.loss.frozen_models else None,
        guidance=guidance if "guidance" in config.loss.frozen_models else None,
        pairs_hash=data.summary.pairs_hash,
        rewards=rewards,
    )


def _name_samples(data: PreparedPairs, picked: Sequence[int] | np.ndarray) -> str:
    names = ", ".join(str(data.rows[pair]) for pair in picked[:8])
    return f"rows {names}{', …' if len(picked) > 8 else ''} of {Path(data.summary.source).name}"


def _headline(metrics: dict[str, float]) -> str:
    shown = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "grad_norm": "grad norm"}
    return ", ".join(f"{words} {metrics[name]:.4g}" for name, words in shown.items() if name in metrics)
