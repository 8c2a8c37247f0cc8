"""Train a policy on preference pairs: one program, from top to bottom.

First every input is checked, and this rank's part of the models is built. Then, in each step, Megatron's schedule runs
all micro-batches, :class:`PreferenceLoss` turns token log-probs into a sum over pairs, Megatron divides the gradients
once by the number of pairs of all ranks, and AdamW updates the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from tqdm import tqdm

from tgdpo_megatron import preflight, run_folder
from tgdpo_megatron.answers import answer_held_out, keep_answers
from tgdpo_megatron.checkpoint import located
from tgdpo_megatron.checkpoint.convert import megatron_to_hf
from tgdpo_megatron.checkpoint.manifest import HF, CheckpointManifest, read_manifest
from tgdpo_megatron.checkpoint.sources import Source
from tgdpo_megatron.checkpoint.state import load_training_state, save_checkpoint
from tgdpo_megatron.config import Config, check_batch_layout, on_device, with_steps
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.order import Mix, global_batch, mix_of
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.data.tokenizer import hash_of, template_of, tokenizer_for
from tgdpo_megatron.engine import Engine, build_engine
from tgdpo_megatron.errors import NonFiniteError, StoppedError, UserError, in_short
from tgdpo_megatron.pair_losses import PreferenceLoss, Start, start_of
from tgdpo_megatron.platform import interrupts
from tgdpo_megatron.platform.checks import check_fp8
from tgdpo_megatron.platform.clock import EVALUATING, READING, SAVING
from tgdpo_megatron.platform.processes import Ranks, command_words, initialize_model_parallel, on_first_rank
from tgdpo_megatron.quiet import debugging
from tgdpo_megatron.report.loggers import Logger
from tgdpo_megatron.report.metrics import averages
from tgdpo_megatron.report.pace import Pace, where_time_went
from tgdpo_megatron.report.terminal import (
    Loudness,
    changed_settings,
    closing_lines,
    held_out_results,
    length_of_run,
    progress_words,
    result_words,
)

EVALUATED_AT_ONCE = 1024
"""Number of validation pairs whose batches are in memory together, over all ranks."""
ROUNDING = {"fp32": 0.01, "bf16": 0.5, "fp8": 2.0}
"""How far rounding may move the log-prob of a response, nats, on average over the pairs of the first step."""


@dataclass(frozen=True)
class _Part:
    """Training or validation pairs, with their scores from files where the run reads any."""

    pairs: PreparedPairs
    scores: TokenScores | None


@dataclass(frozen=True)
class _Run:
    """A run whose inputs have passed all checks, with this rank's part of its models.

    Attributes:
        config: The settings, with the number of steps and the number format filled in.
        mix: How often the pairs of each file are seen; None for once in each epoch.
        resumed_from: The checkpoint from which the run continues; None for a new run.
        first: Number of optimizer steps done before.
        start: What is known of the loss of the first step; None where nothing is.
        is_new: Whether the run made its folder.
        found: Role -> where each model was found, and how the user had named it.
        identity: Identity of the run's checkpoints, without fingerprints of weights and iteration.
        template: Text of the chat template that checkpoints get in place of the tokenizer's own; None to keep that.
    """

    config: Config
    output: Path
    engine: Engine
    training: _Part
    mix: Mix | None
    validation: _Part | None
    resumed_from: Path | None
    first: int
    start: Start | None
    is_new: bool
    found: dict[str, Source]
    identity: CheckpointManifest
    template: str | None

    @property
    def epoch_size(self) -> int:
        """Training pairs in one epoch."""
        return self.mix.epoch_size if self.mix else len(self.training.pairs)

    def pace(self, ranks: Ranks) -> Pace:
        """What measures the speed of the run."""
        gpu = torch.cuda.get_device_name() if ranks.device.type == "cuda" else None
        description = self.engine.chunks[0].description
        return Pace(self.config, description, self.training.pairs, ranks=ranks.world_size, gpu=gpu)


def train(config: Config, ranks: Ranks, loudness: Loudness = Loudness.NORMAL) -> None:
    """Run one training job. Called on every rank.

    Raises:
        UserError: An input cannot be used. A folder that was not there before is removed again.
        NonFiniteError: A loss or gradient is not finite. The last good checkpoint is kept.
        StoppedError: A signal asked for the end. The step was finished, and a checkpoint saved.
    """
    run = _prepare(config, ranks, loudness)
    config, engine, output, pairs = run.config, run.engine, run.output, run.training.pairs
    if ranks.is_first:
        _introduce(run, loudness)
    last = config.train.train_iters or 0
    logger = Logger(output, config, active=ranks.is_first, first=run.first)
    progress = tqdm(
        range(run.first, last),
        initial=run.first,
        total=last,
        desc=config.loss.type,
        disable=not ranks.is_first or loudness == Loudness.QUIET,
        unit="step",
        mininterval=1,
    )
    if config.train.fp8_recipe == "delayed":
        engine.find_scales(_micro_batches(run.training, _picked(run, run.first), config, ranks))
    if run.validation is not None and run.first == 0:
        before = _evaluate(engine, run.validation, config, ranks)
        _check_finite(before, "the validation loss before the first step", output)
        logger.log(0, {f"eval/{name}": value for name, value in averages(before).items()})
    if run.first == 0:
        _answer(run, ranks, "before")
    pace = run.pace(ranks)
    engine.clock.restart()
    started = saved_at = time.monotonic()
    replaced: Path | None = None  # the checkpoint that the next one replaces
    done, stop = run.first, False
    with interrupts.noticed() as asked:
        for iteration in progress:
            began = time.monotonic()
            picked = _picked(run, iteration)
            with engine.clock.during(READING):
                batches = _micro_batches(run.training, picked, config, ranks)
            done = iteration + 1
            where = f"step {done} ({_name_samples(pairs, picked)})"
            overdue = ranks.is_first and 0 < config.train.save_minutes * 60 <= began - saved_at
            metrics, stop, save = _step(run, batches, done, where, stop=asked.received is not None, save=overdue)
            metrics |= pace.of_step(picked, time.monotonic() - began)
            for sentence in logger.new_warnings(config.loss, metrics):
                progress.write(f"warning: step {done}: {sentence}")
            # A run that is stopped has little time left, and saves first of all.
            due = not stop and (done == last or _is_due(done, config.train.eval_interval))
            if run.validation is not None and due:
                with engine.clock.during(EVALUATING):
                    held_out = _evaluate(engine, run.validation, config, ranks)
                _check_finite(held_out, f"the validation loss after {where}", output)
                metrics |= {f"eval/{name}": value for name, value in averages(held_out).items()}
                if done < last and ranks.is_first and loudness > Loudness.QUIET:
                    progress.write(f"step {done}: held out: {result_words(metrics, 'eval/')}")
            if due or stop or _is_due(done, config.train.log_interval):
                metrics |= pace.since_last_line(engine.clock.of_all_ranks)
                logger.log(done, metrics)
                progress.set_postfix_str(progress_words(metrics), refresh=False)
                if ranks.is_first and loudness == Loudness.VERBOSE:
                    progress.write(json.dumps({"iteration": done, **metrics}))
            every = config.train.export_interval
            export = not stop and every > 0 and (done == last or _is_due(done, every))
            keep = done == last or stop or export or _is_due(done, config.train.save_interval)
            if keep or save:
                # Finite weights can still give losses that are not finite. A forward pass tells before they are saved.
                with engine.clock.during(SAVING):
                    _check_finite(engine.forward(batches), f"the loss after {where}", output)
                    checkpoint = _save(run, done)
                if ranks.is_first and replaced is not None:
                    shutil.rmtree(replaced, ignore_errors=True)
                replaced, saved_at = None if keep else checkpoint, time.monotonic()
                if export:
                    on_first_rank(ranks, partial(_export, checkpoint, output))
            if stop:
                progress.update()
                break
    logger.close()
    progress.close()
    seconds, went = time.monotonic() - started, where_time_went(engine.time_spent())
    if done == last:
        _answer(run, ranks, "after")
    on_first_rank(ranks, partial(_conclude, run, ranks, done, seconds, went))
    if done < last:
        raise StoppedError(
            f"stopped as asked after step {done} of {last}, which is saved; go on with the same command and "
            "train.resume=true.",
            asked.received or signal.SIGTERM,
        )


def _step(
    run: _Run, batches: list[Batch], done: int, where: str, *, stop: bool, save: bool
) -> tuple[dict[str, float], bool, bool]:
    """One optimizer step. Collective.

    Args:
        where: The step and its pairs, for errors.
        stop, save: Whether this rank wants to stop, or to save, after the step.

    Returns:
        The step's metrics, and whether any rank wants to stop, or to save.
    """
    run.engine.zero_grad()
    # What the ranks want is added up together with the sums, so that agreeing costs no reduction of its own.
    totals = run.engine.forward_backward(batches, votes={"stop": stop, "save": save})
    stop, save = totals.pop("stop") > 0, totals.pop("save") > 0
    _check_finite(totals, f"the loss of {where}", run.output)
    if done == 1 and run.start is not None:
        _check_start(totals["loss"] / totals["pairs"], run.start, run)
    grad_norm, learning_rate = run.engine.update()
    if not math.isfinite(grad_norm):
        raise NonFiniteError(f"the gradient of {where} is not finite; {run_folder.what_is_kept(run.output)}.")
    metrics = averages(totals) | {
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "epoch": done * run.config.train.global_batch_size / run.epoch_size,
        "num_tokens": totals["tokens"],
        "num_padding_tokens": totals["padding"],
    }
    return metrics, stop, save


def _check_start(found: float, start: Start, run: _Run) -> None:
    """Refuse a first loss that is not what it must be while the policy is the reference. Nothing was updated yet.

    Raises:
        UserError: Policy and reference give different log-probs. A folder that was not there before is removed again.
    """
    # Cached scores were computed in other micro-batches, and an FP8 policy stands beside a reference in bf16.
    precision = "fp8" if run.config.train.fp8 else run.config.train.precision
    if abs(found - start.value) <= ROUNDING[precision] * start.slope:
        return
    if run.is_new:
        shutil.rmtree(run.output, ignore_errors=True)
    raise UserError(
        f"the loss of the first step is {found:.4f}, but policy and reference are the same model, where "
        f"loss.type={run.config.loss.type} gives {start.value:.4f}; nothing was updated. Either the cached scores are "
        "of another model, or this layout computes something else than the one that scored."
    )


def _picked(run: _Run, iteration: int) -> np.ndarray:
    """The training pairs of an optimizer step."""
    return global_batch(
        iteration,
        num_pairs=len(run.training.pairs),
        global_batch_size=run.config.train.global_batch_size,
        seed=run.config.train.seed,
        shuffle=run.config.data.shuffle,
        mix=run.mix,
    )


def _introduce(run: _Run, loudness: Loudness) -> None:
    """Keep the settings with the run, and say what is about to happen."""
    settings = run_folder.keep_settings(run.output, run.config, run.found)
    words, unusual = length_of_run(run.config, run.epoch_size)
    if loudness == Loudness.VERBOSE:
        print(settings, end="")
    elif loudness == Loudness.NORMAL:
        print("\n".join(changed_settings(run_folder.as_given(run.config, run.found))))
    arithmetic = f"{run.config.train.precision} on the {run.engine.device.type.upper().replace('CUDA', 'GPU')}"
    if loudness > Loudness.QUIET:
        where = f"going on from {run.resumed_from}" if run.resumed_from else f"in {run.output}"
        print(f"{run.config.loss.type} {where}, {arithmetic}: {words}", flush=True)
    if run.config.train.resume and run.resumed_from is None:
        print(f"warning: {run.output} holds no checkpoint to go on from, so the run starts anew.", flush=True)
    if unusual:
        print("warning: the run is far from one epoch of its pairs, which train.num_epochs=1 would be.", flush=True)


def _save(run: _Run, done: int) -> Path:
    """Save a checkpoint. Collective."""
    folder = run.output / "checkpoints" / f"iter-{done:07d}"
    run.engine.gather_weights()
    save_checkpoint(
        folder,
        run.engine.chunks,
        run.engine.optimizer,
        run.engine.scheduler,
        companions=_start_of(run.config),
        template=run.template,
        manifest=replace(run.identity, iteration=done),
    )
    return folder


def _export(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint as a HuggingFace model into the folder of the run. A run goes on without its exports."""
    folder = output / run_folder.EXPORTS / checkpoint.name
    if folder.exists():  # a resumed run may have come here before
        return
    try:
        megatron_to_hf(checkpoint, folder)
    except UserError as error:
        by_hand = f"python -m tools.convert_megatron_to_hf {checkpoint} {folder}"
        tqdm.write(f"warning: not exported ({str(error).removesuffix('.')}); later: {by_hand}", file=sys.stderr)


def _answer(run: _Run, ranks: Ranks, when: str) -> None:
    """Let the policy answer some held-out prompts, where the report shows them. Collective."""
    if not (run.config.train.report and run.config.report.samples) or run.validation is None:
        return
    run.engine.gather_weights()
    tokenizer = tokenizer_for(_start_of(run.config) / HF, run.config.data)
    held_out = run.validation.pairs
    found = answer_held_out(run.engine.chunks, held_out, tokenizer, run.config, ranks.device)
    if ranks.is_first:
        keep_answers(run.output, found, when)


def _conclude(run: _Run, ranks: Ranks, done: int, seconds: float, went: str) -> None:
    """Write the report, and say what came out of the run."""
    checkpoint = run_folder.newest_checkpoint(run.output)
    assert checkpoint is not None
    report = _report(run, ranks) if run.config.train.report else None
    lines = closing_lines(
        steps=done - run.first,
        finished=done == run.config.train.train_iters,
        seconds=seconds,
        went=went,
        held_out=held_out_results(run.output),
        held_out_pairs=len(run.validation.pairs) if run.validation else 0,
        checkpoint=checkpoint,
        exported=run_folder.export_of(checkpoint),
        report=report,
    )
    print("\n".join(lines), flush=True)


def _report(run: _Run, ranks: Ranks) -> Path | None:
    """Write report.html. A run that is finished and saved does not fail by its report."""
    from tgdpo_megatron.report.run_report import write_run_report  # late: it loads matplotlib

    try:
        return write_run_report(run.output, world_size=ranks.world_size, command=command_words())
    except Exception as error:
        if debugging():
            traceback.print_exc()
        print(f"warning: {run_folder.REPORT} was not written ({in_short(error)}); TGDPO_DEBUG=1 shows why.", flush=True)
        return None


def _prepare(config: Config, ranks: Ranks, loudness: Loudness) -> _Run:
    """Check everything that can be wrong with the inputs, then build this rank's part of the models. Collective.

    Raises:
        UserError: An input cannot be used. A run folder that was not there before is removed again.
    """
    config = on_device(config, ranks.device.type)
    check_batch_layout(config, world_size=ranks.world_size)
    check_fp8(config.train)
    on_first_rank(ranks, partial(preflight.check_services, config))
    output = preflight.required(config.train.output, "train.output", "a folder for this run")
    is_new = ranks.is_first and not output.exists()
    with run_folder.removed_if_refused(output, is_first=ranks.is_first):
        resumed_from = on_first_rank(ranks, partial(run_folder.check_output, output, config))
        run_folder.keep_output(output, ranks.rank)
        quiet = loudness == Loudness.QUIET
        commits = run_folder.kept_commits(output if resumed_from else None)
        config = run_folder.with_kept_data(config, output if resumed_from else None)
        config, found = located.models_on_every_rank(config, ranks, commits, quiet=quiet)
        with located.named_as_given(config, found):
            models = preflight.check_models(config)
            frozen = preflight.carried_checkpoints(config)
        template = template_of(config.data.template)
        pairs, validation = preflight.load_data(config, models.description, ranks, output / "data", quiet=quiet)
        counts = [file.pairs for file in pairs.files]
        preflight.check_batch_fits(config, counts, config.train.global_batch_size)
        mix = mix_of(counts, config.data.weights)
        warmup = run_folder.warmup_of(resumed_from) if resumed_from else None
        config = with_steps(config, mix.epoch_size if mix else len(pairs), warmup=warmup)
        scores, validation_scores = preflight.load_scores_of(config, models, pairs, validation)
        identity = _identity(config, models, pairs, scores, template)
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
    part = _Part(pairs, scores)
    same = models.policy.weights == models.reference.weights
    start = start_of(config.loss) if same else None
    return _Run(
        config, output, engine, part, mix, held_out, resumed_from, first, start, is_new, found, identity, template
    )


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


def _is_due(done: int, interval: int) -> bool:
    """Whether something is due after `done` steps: every `interval` steps, or never with 0."""
    return interval > 0 and done % interval == 0


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
    config: Config,
    models: preflight.Models,
    data: PreparedPairs,
    scores: TokenScores | None,
    template: str | None,
) -> CheckpointManifest:
    """Identity of the run's checkpoints, without fingerprints of weights and iteration.

    Args:
        template: Text of the chat template that they get in place of the tokenizer's own.
    """
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
        template=models.policy.template if template is None else hash_of(template),
        chat_template_kwargs=config.data.chat_template_kwargs,
        reference=models.reference.weights if "reference" in config.loss.frozen_models else None,
        guidance=guidance if "guidance" in config.loss.frozen_models else None,
        pairs_hash=data.summary.pairs_hash,
        rewards=rewards,
    )


def _name_samples(data: PreparedPairs, picked: Sequence[int] | np.ndarray) -> str:
    more = ", …" if len(picked) > 8 else ""
    if data.summary.parts:
        return ", ".join(data.name(int(pair)) for pair in picked[:8]) + more
    names = ", ".join(str(data.rows[pair]) for pair in picked[:8])
    return f"rows {names}{more} of {Path(data.summary.source).name}"
