"""Train a policy on preference pairs: one program, from top to bottom.

First every input is checked, and this rank's part of the models is built. Then, in each step, Megatron's schedule runs
all micro-batches, :class:`PreferenceLoss` turns token log-probs into a sum over pairs, Megatron divides the gradients
once by the number of pairs of all ranks, and AdamW updates the weights.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from megatron.core import parallel_state
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
from tgdpo_megatron.pair_losses import PreferenceLoss
from tgdpo_megatron.platform.checks import check_fp8
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel, on_first_rank
from tgdpo_megatron.report.metrics import Logger, averages

EVALUATED_AT_ONCE = 1024
"""Number of validation pairs whose batches are in memory together, over all ranks."""


@dataclass(frozen=True)
class _Part:
    """Training or validation pairs, with their scores from files where the run reads any."""

    pairs: PreparedPairs
    scores: TokenScores | None


@dataclass(frozen=True)
class _Run:
    """A run whose inputs have passed all checks, with this rank's part of its models.

    Attributes:
        start: The checkpoint from which the run continues; None for a new run.
        first: Number of optimizer steps done before.
        identity: Identity of the run's checkpoints, without fingerprints of weights and iteration.
    """

    output: Path
    engine: Engine
    training: _Part
    validation: _Part | None
    resumed_from: Path | None
    first: int
    identity: CheckpointManifest


def train(config: Config, ranks: Ranks) -> None:
    """Run one training job. Called on every rank.

    Raises:
        UserError: An input cannot be used. A folder that was not there before is removed again.
        NonFiniteError: A loss or gradient is not finite. The last good checkpoint is kept.
    """
    run = _prepare(config, ranks)
    if ranks.is_first:
        run_folder.record(run.output, config, run.resumed_from)
    engine, output, pairs = run.engine, run.output, run.training.pairs
    last = config.train.train_iters
    logger = Logger(output, active=ranks.is_first, first=run.first)
    progress = tqdm(
        range(run.first, last),
        initial=run.first,
        total=last,
        desc=config.loss.type,
        disable=not ranks.is_first,
        unit="step",
        mininterval=1,
    )

    for iteration in progress:
        started = time.monotonic()
        picked = global_batch(
            iteration,
            num_pairs=len(pairs),
            global_batch_size=config.train.global_batch_size,
            seed=config.train.seed,
            shuffle=config.data.shuffle,
        )
        batches = _micro_batches(run.training, picked, config, ranks)
        if iteration == run.first and config.train.fp8_recipe == "delayed":
            engine.find_scales(batches)
        engine.zero_grad()
        totals = engine.forward_backward(batches)
        done = iteration + 1
        where = f"step {done} ({_name_samples(pairs, picked)})"
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
        for sentence in logger.new_warnings(config.loss, metrics):
            progress.write(f"warning: step {done}: {sentence}")
        evaluated = {}
        if run.validation is not None and _is_due(done, config.train.eval_interval, last=last):
            evaluated = _evaluate(engine, run.validation, config, ranks)
            _check_finite(evaluated, f"the validation loss after {where}", output)
            metrics |= {f"eval/{name}": value for name, value in averages(evaluated).items()}
        if evaluated or _is_due(done, config.train.log_interval, last=last):
            logger.log(done, metrics)
            progress.set_postfix_str(_headline(metrics), refresh=False)
        if _is_due(done, config.train.save_interval, last=last):
            # Finite weights can still give losses that are not finite. One forward pass tells before they are saved.
            _check_finite(engine.forward(batches), f"the loss after {where}", output)
            engine.gather_weights()
            save_checkpoint(
                output / "checkpoints" / f"iter-{done:07d}",
                engine.chunks,
                engine.optimizer,
                engine.scheduler,
                companions=_start_of(config),
                manifest=replace(run.identity, iteration=done),
            )
    logger.close()
    if ranks.is_first:
        print(f"done: {run_folder.newest_checkpoint(output)}", flush=True)


def _prepare(config: Config, ranks: Ranks) -> _Run:
    """Check everything that can be wrong with the inputs, then build this rank's part of the models. Collective.

    Raises:
        UserError: An input cannot be used. A run folder that was not there before is removed again.
    """
    check_batch_layout(config, world_size=ranks.world_size)
    check_fp8(config.train)
    models = preflight.check_models(config)
    frozen = preflight.carried_checkpoints(config)
    output = preflight.required(config.train.output, "train.output", "a folder for this run")
    with run_folder.removed_if_refused(output, is_first=ranks.is_first):
        resumed_from = on_first_rank(ranks, partial(run_folder.check_output, output, config))
        run_folder.keep_output(output, ranks.rank)
        pairs, validation = preflight.load_data(config, models.description, ranks, output / "data")
        if config.train.global_batch_size > len(pairs):
            raise UserError(
                f"train.global_batch_size={config.train.global_batch_size} is more than the {len(pairs)} pairs of "
                f"{config.data.train}; lower it."
            )
        scores, validation_scores = preflight.load_scores_of(config, models, pairs, validation)
        identity = _identity(config, models, pairs, scores)
        run_folder.check_continues(resumed_from, config, identity)
        initialize_model_parallel(config.parallel, config.train.seed)
        engine = build_engine(
            config,
            models.description,
            loss=PreferenceLoss(config),
            start=None if resumed_from else _start_of(config),
            frozen=frozen,
        )
        first = 0
        if resumed_from is not None:
            load_training_state(resumed_from, engine.chunks, engine.optimizer, engine.scheduler)
            first = read_manifest(resumed_from).iteration or 0
    held_out = _Part(validation, validation_scores) if validation is not None else None
    return _Run(output, engine, _Part(pairs, scores), held_out, resumed_from, first, identity)


def _start_of(config: Config) -> Path:
    """The checkpoint whose model is trained."""
    return preflight.required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from")


def _micro_batches(part: _Part, picked: np.ndarray, config: Config, ranks: Ranks) -> list[Batch]:
    """This data-parallel rank's micro-batches of some pairs."""
    return rank_batches(
        part.pairs,
        picked,
        config,
        sides=config.loss.method.sides,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        device=ranks.device,
        scores=part.scores,
    )


def _is_due(done: int, interval: int, *, last: int) -> bool:
    """Whether something is due after `done` steps: every `interval` steps (0: never), and after the last step."""
    return done == last or (interval > 0 and done % interval == 0)


def _evaluate(engine: Engine, validation: _Part, config: Config, ranks: Ranks) -> dict[str, float]:
    """The sums that the loss reports, over all validation pairs. Collective."""
    totals: dict[str, float] = {}
    for first in range(0, len(validation.pairs), EVALUATED_AT_ONCE):
        picked = np.arange(first, min(first + EVALUATED_AT_ONCE, len(validation.pairs)))
        part = engine.forward(_micro_batches(validation, picked, config, ranks))
        totals = {name: totals.get(name, 0.0) + value for name, value in part.items()}
    return totals


def _check_finite(totals: dict[str, float], what: str, output: Path) -> None:
    if totals["not_finite"] or not all(map(math.isfinite, totals.values())):
        raise NonFiniteError(f"{what} is not finite; {run_folder.what_is_kept(output)}.")


def _identity(
    config: Config, models: preflight.Models, data: PreparedPairs, scores: TokenScores | None
) -> CheckpointManifest:
    """Identity of the run's checkpoints, without fingerprints of weights and iteration."""
    guidance = models.guidance.weights if models.guidance else None
    if guidance is None and scores is not None and scores.manifest is not None:
        guidance = scores.manifest.guidance
    rewards = None
    if "better" in config.loss.scores and scores is not None and scores.manifest is not None:
        rewards = scores.manifest.prompts
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
