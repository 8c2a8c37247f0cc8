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
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from tqdm import tqdm

from tgdpo_megatron import preflight, resuming, run_folder
from tgdpo_megatron.answers import answer_held_out, keep_answers
from tgdpo_megatron.checkpoint import located
from tgdpo_megatron.checkpoint.convert import megatron_to_hf
from tgdpo_megatron.checkpoint.manifest import HF, CheckpointManifest, read_manifest
from tgdpo_megatron.checkpoint.sources import Source
from tgdpo_megatron.checkpoint.state import load_training_state
from tgdpo_megatron.config import Config, check_batch_layout, on_device, with_steps
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.order import Mix, global_batch, mix_of
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.data.tokenizer import hash_of, template_of, tokenizer_for
from tgdpo_megatron.engine import Engine, build_engine
from tgdpo_megatron.errors import NonFiniteError, StoppedError, UserError, code_of, in_short
from tgdpo_megatron.incidents import Incidents
from tgdpo_megatron.pair_losses import PreferenceLoss, Start, start_of
from tgdpo_megatron.planning.disk import check_disk
from tgdpo_megatron.platform import interrupts, life
from tgdpo_megatron.platform.checks import check_fp8
from tgdpo_megatron.platform.clock import EVALUATING, READING, SAVING
from tgdpo_megatron.platform.processes import Ranks, command_words, initialize_model_parallel, on_first_rank
from tgdpo_megatron.platform.random_states import set_for_step
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
from tgdpo_megatron.run_lock import RunLock
from tgdpo_megatron.saves import Content, Saves, best_checkpoint, is_due

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
        saves: Saves its checkpoints.
        incidents: What goes wrong in single steps.
        lock: Keeps other jobs out of the folder.
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
    saves: Saves
    incidents: Incidents
    lock: RunLock

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
    deadline = interrupts.Deadline(config.train.exit_after_minutes)
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
        _check_finite(before, "the validation loss before the first step", run)
        logger.log(0, {f"eval/{name}": value for name, value in averages(before).items()})
    if run.first == 0:
        _answer(run, ranks, "before")
    pace = run.pace(ranks)
    engine.clock.restart()
    started, saves = time.monotonic(), run.saves
    done, stop = run.first, False
    with interrupts.noticed() as asked:
        for iteration in progress:
            began = time.monotonic()
            picked = _picked(run, iteration)
            with engine.clock.during(READING):
                batches = _micro_batches(run.training, picked, config, ranks)
            done = iteration + 1
            where = f"step {done} ({_name_samples(pairs, picked)})"
            overdue = ranks.is_first and saves.overdue
            asks = asked.received is not None or (ranks.is_first and deadline.is_near())
            life.at(f"step {done}, forward and backward", watched=done > run.first + 1)  # the first may compile
            metrics, stop, save = _step(run, picked, batches, done, where, stop=asks, save=overdue)
            metrics |= pace.of_step(picked, time.monotonic() - began)
            for sentence in logger.new_warnings(config.loss, metrics):
                progress.write(f"warning: step {done}: {sentence}")
            # A run that is stopped has little time left, and saves first of all; after its last step it is done anyway.
            stop = stop and done < last
            due = not stop and (done == last or is_due(done, config.train.eval_interval))
            if run.validation is not None and due:
                life.at(f"evaluating after step {done}", watched=True)
                with engine.clock.during(EVALUATING):
                    held_out = _evaluate(engine, run.validation, config, ranks)
                _check_finite(held_out, f"the validation loss after {where}", run)
                metrics |= {f"eval/{name}": value for name, value in averages(held_out).items()}
                if done < last and ranks.is_first and loudness > Loudness.QUIET:
                    progress.write(f"step {done}: held out: {result_words(metrics, 'eval/')}")
            told = "loss" in metrics or (due and run.validation is not None)  # little is known of a skipped step
            if told and (due or stop or is_due(done, config.train.log_interval)):
                metrics |= pace.since_last_line(engine.clock.of_all_ranks)
                logger.log(done, metrics)
                if "loss" in metrics:
                    progress.set_postfix_str(progress_words(metrics), refresh=False)
                if ranks.is_first and loudness == Loudness.VERBOSE:
                    progress.write(json.dumps({"iteration": done, **metrics}))
            every = config.train.export_interval
            export = not stop and every > 0 and (done == last or is_due(done, every))
            with engine.clock.during(SAVING):
                saves.settle()
            if save or saves.due(done, stop=stop):
                life.at(f"saving the checkpoint of step {done}")
                # Finite weights can still give losses that are not finite. A forward pass tells before they are saved.
                if "loss" not in metrics:  # a step that was skipped may have pairs that no weights suit
                    batches = _micro_batches(run.training, _picked(run, done), config, ranks)
                with engine.clock.during(SAVING):
                    _check_finite(engine.forward(batches), f"the loss after {where}", run)
                    held_out = {name: value for name, value in metrics.items() if name.startswith("eval/")}
                    checkpoint = saves.save(done, held_out, wait=stop or done == last or export)
                if export:
                    on_first_rank(ranks, partial(_export, checkpoint, output))
            if stop:
                progress.update()
                break
    life.at("ending the run")
    logger.close()
    progress.close()
    seconds, went = time.monotonic() - started, where_time_went(engine.time_spent())
    if done == last:
        _answer(run, ranks, "after")
    on_first_rank(ranks, partial(_conclude, run, ranks, done, seconds, went))
    run.lock.release()
    if done < last:
        raise StoppedError(
            f"stopped as asked after step {done} of {last}, which is saved; go on with the same command and "
            "train.resume=true.",
            code_of([asked.received] if asked.received else []),
        )


def _step(
    run: _Run, picked: np.ndarray, batches: list[Batch], done: int, where: str, *, stop: bool, save: bool
) -> tuple[dict[str, float], bool, bool]:
    """One optimizer step, which is skipped where its loss or gradient is not finite. Collective.

    The step number gives the schedule of the learning rate and the order of the pairs, so that both move on in a step
    that is skipped, and nothing else does.

    Args:
        picked: The pairs of the step, of which `batches` are this rank's micro-batches.
        where: The step and its pairs, for errors.
        stop, save: Whether this rank wants to stop, or to save, after the step.

    Returns:
        The step's metrics, without a loss where it was skipped, and whether any rank wants to stop, or to save.
    """
    engine, settings = run.engine, run.config.train
    set_for_step(settings.seed, done)
    engine.zero_grad()
    # What the ranks want is added up together with the sums, so that agreeing costs no reduction of its own.
    totals = engine.forward_backward(batches, votes={"stop": stop, "save": save})
    stop, save = totals.pop("stop") > 0, totals.pop("save") > 0
    run.incidents.keep_samples(done, picked)
    if done == 1 and run.start is not None and _is_finite(totals):
        _check_start(totals["loss"] / totals["pairs"], run.start, run)
    learning_rate = engine.next_learning_rate()
    if not _is_finite(totals):
        return run.incidents.skip(done, "loss", picked, batches, where), stop, save
    loss = totals["loss"] / totals["pairs"]
    run.incidents.look_for_leap(done, loss, batches)
    life.at(f"step {done}, update", watched=done > run.first + 1)
    grad_norm = engine.update()
    if not math.isfinite(grad_norm):
        return run.incidents.skip(done, "gradient", picked, batches, where), stop, save
    metrics = (
        averages(totals)
        | run.incidents.done(loss)
        | {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "epoch": done * settings.global_batch_size / run.epoch_size,
            "num_tokens": totals["tokens"],
            "num_padding_tokens": totals["padding"],
        }
    )
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
        best=best_checkpoint(run_folder.whole_checkpoints(run.output), run.config.train.keep_best),
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
    life.at("checking the inputs")
    on_first_rank(ranks, partial(preflight.check_services, config))
    output = preflight.required(config.train.output, "train.output", "a folder for this run")
    is_new = ranks.is_first and not output.exists()
    with run_folder.removed_if_refused(output, is_first=ranks.is_first):
        lock = RunLock(output)
        on_first_rank(ranks, partial(_open, output, lock, config))
        lock.share()
        resumed_from = resuming.find_start(output, ranks) if config.train.resume else None
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
        warmup = resuming.warmup_of(resumed_from) if resumed_from else None
        config = with_steps(config, mix.epoch_size if mix else len(pairs), warmup=warmup)
        scores, validation_scores = preflight.load_scores_of(config, models, pairs, validation)
        identity = _identity(config, models, pairs, scores, template)
        changes = resuming.check_continues(resumed_from, config, identity, models.description)
        if ranks.is_first:
            for change in changes:
                print(f"warning: {change}; train.resume_with_changes=true goes on all the same.", flush=True)
        on_first_rank(ranks, partial(check_disk, output, config, models.description))
        initialize_model_parallel(config.parallel, config.train.seed)
        life.at("building and loading the models")
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
    saves = Saves(
        output, config, engine, Content(identity, _start_of(config), template, run_folder.settings_text(config, found))
    )
    incidents = Incidents(
        output,
        config,
        engine,
        pairs,
        lambda picked: _micro_batches(part, picked, config, ranks),
        first=first,
        ranks=ranks,
    )
    return _Run(
        config,
        output,
        engine,
        part,
        mix,
        held_out,
        resumed_from,
        first,
        start,
        is_new,
        found,
        saves,
        incidents,
        lock,
    )


def _open(output: Path, lock: RunLock, config: Config) -> None:
    """Take the folder of the run for this job. Called on the first rank.

    Raises:
        UserError: As check_output, or another job works there.
    """
    if lock.path.exists():  # that a run is under way is said first; a folder that is none is left as it was
        lock.take()
    run_folder.check_output(output, config)
    lock.take()


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


def _evaluate(engine: Engine, validation: _Part, config: Config, ranks: Ranks) -> dict[str, float]:
    """The sums that the loss reports, over all validation pairs. Collective."""
    totals: dict[str, float] = {}
    for first in range(0, len(validation.pairs), EVALUATED_AT_ONCE):
        picked = np.arange(first, min(first + EVALUATED_AT_ONCE, len(validation.pairs)))
        part = engine.forward(_micro_batches(validation, picked, config, ranks))
        totals = {name: totals.get(name, 0.0) + value for name, value in part.items()}
    return totals


def _is_finite(totals: dict[str, float]) -> bool:
    return not totals["not_finite"] and all(map(math.isfinite, totals.values()))


def _check_finite(totals: dict[str, float], what: str, run: _Run) -> None:
    if not _is_finite(totals):
        raise NonFiniteError(f"{what} is not finite; {run.saves.what_is_kept()}.")


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
