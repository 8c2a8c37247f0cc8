"""Train a policy on preference pairs: one program, from top to bottom.

First every input is checked, and this rank's part of the models is built. Then, in each step, Megatron's schedule runs
all micro-batches, :class:`PreferenceLoss` turns token log-probs into a sum over pairs, Megatron divides the gradients
once by the number of pairs of all ranks, and AdamW updates the weights.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from tgdpo_megatron import run_folder
from tgdpo_megatron.answers import answer_held_out, keep_answers
from tgdpo_megatron.checkpoint.convert import megatron_to_hf
from tgdpo_megatron.checkpoint.manifest import HF
from tgdpo_megatron.commands import as_called
from tgdpo_megatron.config import Config
from tgdpo_megatron.data.ahead import Ahead
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.data.tokenizer import tokenizer_for
from tgdpo_megatron.engine import Engine
from tgdpo_megatron.errors import NonFiniteError, StoppedError, UserError, code_of, in_short
from tgdpo_megatron.model.build import HAVE_TRANSFORMER_ENGINE
from tgdpo_megatron.pair_losses import Start
from tgdpo_megatron.platform import accelerators, interrupts, life
from tgdpo_megatron.platform.clock import EVALUATING, READING, SAVING
from tgdpo_megatron.platform.processes import Ranks, command_words, on_first_rank
from tgdpo_megatron.platform.random_states import set_for_step
from tgdpo_megatron.quiet import debugging
from tgdpo_megatron.report.loggers import Logger
from tgdpo_megatron.report.metrics import averages
from tgdpo_megatron.report.pace import where_time_went
from tgdpo_megatron.report.terminal import (
    Loudness,
    changed_settings,
    closing_lines,
    held_out_results,
    length_of_run,
    progress_words,
    result_words,
)
from tgdpo_megatron.run import FinishedRun, Part, Run, prepare, start_of_training
from tgdpo_megatron.saves import best_checkpoint, is_due

EVALUATED_AT_ONCE = 1024
"""Number of validation pairs whose batches are in memory together, over all ranks."""
ROUNDING = {"fp32": 0.01, "bf16": 0.5, "fp8": 2.0}
"""How far rounding may move the log-prob of a response, nats, on average over the pairs of the first step."""


def train(config: Config, ranks: Ranks, loudness: Loudness = Loudness.NORMAL) -> None:
    """Run one training job. Called on every rank. A run that is finished already is told to be so, and left as it is.

    Raises:
        UserError: An input cannot be used. A folder that was not there before is removed again.
        NonFiniteError: Too many steps in a row had a loss or gradient that is not finite, or the weights give none that
            is. The last good checkpoint is kept.
        StoppedError: A signal or the clock asked for the end. The step was finished, and a checkpoint saved.
    """
    run = prepare(config, ranks, loudness)
    if isinstance(run, FinishedRun):
        on_first_rank(ranks, partial(_say_finished, run.checkpoint, config, ranks))
        return run.lock.release()
    if ranks.is_first:
        _introduce(run, loudness)
    last = run.config.train.train_iters or 0
    with Logger(run.output, run.config, active=ranks.is_first, first=run.first) as logger:
        _begin(run, ranks, logger)
        started = time.monotonic()
        with interrupts.noticed() as asked:  # until all is written: a signal that comes then has come too late
            with Ahead(partial(_lay_out, run)) as ahead:
                done = _do_steps(run, ranks, loudness, logger, asked, ahead)
            life.at("ending the run")
            seconds, went = time.monotonic() - started, where_time_went(run.engine.time_spent())
            _check_written(run, ranks, logger)
            if done == last:
                _answer(run, ranks, "after")
            on_first_rank(ranks, partial(_conclude, run, ranks, done, seconds, went))
            run.lock.release()
            if done == last:
                logger.close()
        if done < last:
            code = code_of([asked.received] if asked.received else [])
            on_first_rank(ranks, partial(logger.close, code))  # the others wait: all ranks end together
            raise StoppedError(
                f"stopped as asked after step {done} of {last}, which is saved; go on with the same command and "
                "train.resume=true.",
                code,
            )


def _begin(run: Run, ranks: Ranks, logger: Logger) -> None:
    """What comes before the first step of this process. Collective."""
    train = run.config.train
    if train.fp8_recipe == "delayed":
        run.engine.find_scales(run.training.micro_batches(run.pairs_of(run.first), run.config, ranks.device))
    if run.first == 0:
        if held_out := _held_out(run, ranks, "before the first step"):
            logger.log(0, held_out)
        _answer(run, ranks, "before")
    elif is_due(run.first, train.eval_interval) and not run.was_evaluated:  # a run that is stopped leaves it out
        logger.complete(run.first, _held_out(run, ranks, f"after step {run.first}"))
    if run.resumed_from is not None and is_due(run.first, train.export_interval):  # so does a run that is killed
        on_first_rank(ranks, partial(_export, run.resumed_from, run.output))
    run.engine.clock.restart()


LaidOut = tuple[np.ndarray, list[Batch]]
"""The pairs of a step, and this rank's micro-batches of them."""


def _lay_out(run: Run, iteration: int) -> LaidOut:
    """A step's pairs and this rank's micro-batches of them, on the host. `iteration` counts from 0.

    The copies to the device are left to the thread that works with it, so that a step that is laid out ahead takes
    none of the device's memory.
    """
    picked = run.pairs_of(iteration)
    return picked, run.training.micro_batches(picked, run.config, torch.device("cpu"))


def _do_steps(
    run: Run, ranks: Ranks, loudness: Loudness, logger: Logger, asked: interrupts.Interrupts, ahead: Ahead[LaidOut]
) -> int:
    """Do the steps that are left, or as many until a rank wants to stop. Collective.

    Args:
        ahead: Lays out the steps.

    Returns:
        The number of steps that are done, with those before this process.
    """
    config, engine = run.config, run.engine
    last, done = config.train.train_iters or 0, run.first
    deadline = interrupts.Deadline(config.train.exit_after_minutes)
    account = _Account(run, ranks, loudness, logger)
    learned: np.ndarray | None = None  # the pairs of the last step that was done
    for iteration in account.bar:
        began, done = time.monotonic(), iteration + 1
        life.at(f"step {done}, reading its pairs", watched=done > run.first + 1)
        with engine.clock.during(READING):
            picked, laid_out = ahead.get(iteration)
            batches = [batch.to(ranks.device) for batch in laid_out]
        wishes = partial(_wishes, run, ranks, logger, asked, ranks.is_first and deadline.is_near(run.saves.longest))
        metrics, wanted = _step(run, picked, batches, done, partial(_meanwhile, ahead, done, last, wishes))
        learned = picked if "loss" in metrics else learned
        if wanted["refused"]:
            _check_written(run, ranks, logger)
        # A run that is stopped has little time left, and saves first of all; after its last step it is done anyway.
        stop = wanted["stop"] and done < last
        evaluates = not stop and (done == last or is_due(done, config.train.eval_interval))
        seconds = time.monotonic() - began
        held_out = _held_out(run, ranks, f"after step {done}") if evaluates else {}
        life.at(f"logging step {done}")
        account.tell(done, metrics | account.pace.of_step(picked, seconds), held_out)
        life.at(f"settling the checkpoint before step {done + 1}")
        with engine.clock.during(SAVING):
            run.saves.settle()
            if wanted["save"] or run.saves.due(done, stop=stop):
                _check_written(run, ranks, logger)  # a checkpoint is never ahead of the files that go with it
                _save(run, ranks, done, learned, held_out, stop=stop)
        if stop:
            account.bar.update()
            break
    account.bar.close()
    return done


class _Account:
    """What a run tells of its steps: to its logger, and on the terminal.

    Attributes:
        bar: The steps that are left, counted from 0, with a bar on the terminal.
        pace: Measures the speed of each.
    """

    def __init__(self, run: Run, ranks: Ranks, loudness: Loudness, logger: Logger) -> None:
        self.run, self.loudness, self.logger = run, loudness, logger
        self.pace = run.pace(ranks)
        self.last = run.config.train.train_iters or 0
        self.bar = tqdm(
            range(run.first, self.last),
            initial=run.first,
            total=self.last,
            desc=run.config.loss.type,
            disable=not logger.active or loudness == Loudness.QUIET,
            unit="step",
            mininterval=1,
        )

    def tell(self, done: int, metrics: dict[str, float], held_out: dict[str, float]) -> None:
        """Log a step where that is due, and warn of it.

        Args:
            metrics: Of the step; without a loss where it was skipped.
            held_out: Of the held-out pairs after it; empty where they were not evaluated.
        """
        for sentence in self.logger.new_warnings(self.run.config.loss, metrics):
            self.bar.write(f"warning: step {done}: {sentence}")
        if held_out and done < self.last and self.logger.active and self.loudness > Loudness.QUIET:
            self.bar.write(f"step {done}: held out: {result_words(held_out, 'eval/')}")
        train = self.run.config.train
        due = done == self.last or is_due(done, train.eval_interval) or is_due(done, train.log_interval)
        if not due or not ("loss" in metrics or held_out):  # little is known of a skipped step
            return
        metrics = metrics | held_out | self.pace.since_last_line(self.run.engine.clock.of_all_ranks)
        self.logger.log(done, metrics)
        if "loss" in metrics:
            self.bar.set_postfix_str(progress_words(metrics), refresh=False)
        if self.logger.active and self.loudness == Loudness.VERBOSE:
            self.bar.write(json.dumps({"iteration": done, **metrics}))


def _meanwhile(ahead: Ahead[LaidOut], done: int, last: int, wishes: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What the host does when the device has all the work of a pass: begin with the next step, whose number from 0 is
    `done`, and say whether this rank wants to stop or to save.

    Sooner, the thread would take turns with the one that gives the device its work, and hold it up.
    """
    if done < last:
        ahead.begin(done)
    return wishes()


def _wishes(run: Run, ranks: Ranks, logger: Logger, asked: interrupts.Interrupts, near: bool) -> dict[str, float]:
    """Whether this rank wants to stop, or to save, after the step that is under way, or was refused a line of a file.

    Args:
        near: Whether there is no time left for a step after this one.
    """
    return {
        "stop": near or asked.received is not None,
        "save": ranks.is_first and run.saves.overdue,
        "refused": _refusal(run, logger) is not None,
    }


def _refusal(run: Run, logger: Logger) -> str | None:
    """The sentence about a line of the run's files that the operating system refused this rank; None so far."""
    return run.incidents.refused or logger.refused


def _check_written(run: Run, ranks: Ranks, logger: Logger) -> None:
    """End the run where a line of its files could not be written. A save under way is finished first. Collective.

    Raises:
        UserError: The operating system refused a line.
    """
    kept = run.saves.what_is_kept()

    def check() -> None:
        if refusal := _refusal(run, logger):
            raise UserError(f"{refusal.removesuffix('.')}; {kept}.")

    on_first_rank(ranks, check)


def _step(
    run: Run, picked: np.ndarray, batches: list[Batch], done: int, wishes: Callable[[], Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, bool]]:
    """One optimizer step, which is skipped where its loss or gradient is not finite. Collective.

    The step number gives the schedule of the learning rate and the order of the pairs, so that both move on in a step
    that is skipped, and nothing else does.

    Args:
        picked: The pairs of the step, of which `batches` are this rank's micro-batches.
        wishes: As _wishes.

    Returns:
        The step's metrics, without a loss where it was skipped, and what any rank wishes.
    """
    engine, settings = run.engine, run.config.train
    watched = done > run.first + 1  # the first may compile
    life.at(f"step {done}, forward and backward", watched=watched)
    set_for_step(settings.seed, done)
    engine.zero_grad()
    # What the ranks want is added up together with the sums, so that agreeing costs no reduction of its own.
    totals = engine.forward_backward(batches, wishes)
    wanted = {wish: totals.pop(wish) > 0 for wish in ("stop", "save", "refused")}
    if done == 1 and run.start is not None and _is_finite(totals):
        _check_start(totals["loss"] / totals["pairs"], run.start, run)
    if not _is_finite(totals):
        engine.advance_schedule()
        return run.incidents.skip(done, "loss", picked, batches), wanted
    loss = totals["loss"] / totals["pairs"]
    run.incidents.look_for_leap(done, loss, batches)
    life.at(f"step {done}, update", watched=watched)
    grad_norm, learning_rate = engine.update()
    if not math.isfinite(grad_norm):
        return run.incidents.skip(done, "gradient", picked, batches), wanted
    metrics = (
        averages(totals)
        | run.incidents.done(done, loss, picked)
        | {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "epoch": done * settings.global_batch_size / run.epoch_size,
            "num_tokens": totals["tokens"],
            "num_padding_tokens": totals["padding"],
        }
    )
    return metrics, wanted


def _held_out(run: Run, ranks: Ranks, when: str) -> dict[str, float]:
    """The metrics of the held-out pairs, which begin with `eval/`; empty without such pairs. Collective."""
    if run.validation is None:
        return {}
    life.at(f"evaluating {when}", watched=True)
    with run.engine.clock.during(EVALUATING):
        totals = _evaluate(run.engine, run.validation, run.config, ranks)
    _check_finite(totals, f"the validation loss {when}", run)
    return {f"eval/{name}": value for name, value in averages(totals).items()}


def _evaluate(engine: Engine, validation: Part, config: Config, ranks: Ranks) -> dict[str, float]:
    """The sums that the loss reports, over all validation pairs. Collective."""
    totals: dict[str, float] = {}
    for first in range(0, len(validation.pairs), EVALUATED_AT_ONCE):
        picked = np.arange(first, min(first + EVALUATED_AT_ONCE, len(validation.pairs)))
        part = engine.forward(validation.micro_batches(picked, config, ranks.device))
        totals = {name: totals.get(name, 0.0) + value for name, value in part.items()}
    return totals


def _save(
    run: Run, ranks: Ranks, done: int, learned: np.ndarray | None, held_out: dict[str, float], *, stop: bool
) -> None:
    """Save a checkpoint, and export it where that is due. Collective.

    Args:
        learned: The pairs of the last step that was done; None where this process has skipped every step. Finite
            weights can still give losses that are not finite, and a forward pass of these pairs, whose loss was
            finite before the update, tells so before the weights are saved.
        held_out: Metrics of the held-out pairs after this step.
        stop: Whether the run ends here before its last step.
    """
    life.at(f"saving the checkpoint of step {done}")
    train = run.config.train
    if learned is not None:
        batches = run.training.micro_batches(learned, run.config, ranks.device)
        what = f"the loss after step {done} ({run.training.pairs.names(learned)})"
        _check_finite(run.engine.forward(batches), what, run)
    last = done == train.train_iters
    export = not stop and train.export_interval > 0 and (last or is_due(done, train.export_interval))
    checkpoint = run.saves.save(done, held_out, wait=stop or last or export, stop=stop)
    if export:
        on_first_rank(ranks, partial(_export, checkpoint, run.output))


def _check_start(found: float, start: Start, run: Run) -> None:
    """Refuse a first loss that is not what it must be while the policy is the reference. Nothing was updated yet.

    Raises:
        UserError: Policy and reference give different log-probs. A folder that was not there before is removed again.
    """
    # Cached scores were computed in other micro-batches, and an FP8 policy stands beside a reference in bf16.
    precision = "fp8" if run.config.train.fp8 else run.config.train.precision
    if abs(found - start.value) <= ROUNDING[precision] * start.slope:
        return
    if run.is_new and dist.get_rank() == 0:
        shutil.rmtree(run.output, ignore_errors=True)
    raise UserError(
        f"the loss of the first step is {found:.4f}, but policy and reference are the same model, where "
        f"loss.type={run.config.loss.type} gives {start.value:.4f}; nothing was updated. Either the cached scores are "
        "of another model, or this layout computes something else than the one that scored."
    )


def _introduce(run: Run, loudness: Loudness) -> None:
    """Keep the settings with the run, and say what is about to happen."""
    (run.output / "metrics.jsonl").touch()  # first: by this file a run that is killed is known as one
    settings = run_folder.keep_settings(run.output, run.config, run.found)
    words, unusual = length_of_run(run.config, run.epoch_size)
    if loudness == Loudness.VERBOSE:
        print(settings, end="")
    elif loudness == Loudness.NORMAL:
        print("\n".join(changed_settings(run_folder.as_given(run.config, run.found))))
    arithmetic = f"{run.config.train.precision} on the {run.engine.device.type.upper().replace('CUDA', 'GPU')}"
    if loudness > Loudness.QUIET:
        where = f"going on from {run.resumed_from}" if run.resumed_from else f"in {run.output}"
        layers = accelerators.name_layers(transformer_engine=HAVE_TRANSFORMER_ENGINE)
        print(f"{layers}; {accelerators.name_optimizer(run.engine.optimizer)}")
        print(f"{run.config.loss.type} {where}, {arithmetic}: {words}", flush=True)
    if run.config.train.resume and run.resumed_from is None:
        print(f"warning: {run.output} holds no checkpoint to go on from, so the run starts anew.", flush=True)
    if unusual:
        print("warning: the run is far from one epoch of its pairs, which train.num_epochs=1 would be.", flush=True)


def _say_finished(checkpoint: Path, config: Config, ranks: Ranks) -> None:
    """Say that a run had done all its steps before, and make what an interruption of its end may have left out."""
    output, longer = checkpoint.parent.parent, "train_iters" if config.train.num_epochs is None else "num_epochs"
    print(f"{output}: this run is finished ({checkpoint.name}); raise train.{longer} to go on.", flush=True)
    if config.train.export_interval:
        _export(checkpoint, output)
    report = output / run_folder.REPORT
    if config.train.report and not report.is_file():
        _report(output, ranks)


def _export(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint as a HuggingFace model into the folder of the run. A run goes on without its exports."""
    folder = output / run_folder.EXPORTS / checkpoint.name
    if folder.exists():  # a resumed run may have come here before
        return
    try:
        megatron_to_hf(checkpoint, folder)
    except UserError as error:
        by_hand = as_called(f"python -m tools.convert_megatron_to_hf {checkpoint} {folder}")
        tqdm.write(f"warning: not exported ({str(error).removesuffix('.')}); later: {by_hand}", file=sys.stderr)


def _answer(run: Run, ranks: Ranks, when: str) -> None:
    """Let the policy answer some held-out prompts, where the report shows them. Collective."""
    if not (run.config.train.report and run.config.report.samples) or run.validation is None:
        return
    run.engine.gather_weights()
    tokenizer = tokenizer_for(start_of_training(run.config) / HF, run.config.data)
    held_out = run.validation.pairs
    found = answer_held_out(run.engine.chunks, held_out, tokenizer, run.config, ranks.device)
    if ranks.is_first:
        keep_answers(run.output, found, when)


def _conclude(run: Run, ranks: Ranks, done: int, seconds: float, went: str) -> None:
    """Write the report, and say what came out of the run."""
    checkpoint = run_folder.newest_checkpoint(run.output)
    assert checkpoint is not None
    report = _report(run.output, ranks) if run.config.train.report else None
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
    print(as_called("\n".join(lines)), flush=True)


def _report(output: Path, ranks: Ranks) -> Path | None:
    """Write report.html. A run that is finished and saved does not fail by its report."""
    from tgdpo_megatron.report.run_report import write_run_report  # late: it loads matplotlib

    try:
        return write_run_report(output, world_size=ranks.world_size, command=command_words())
    except Exception as error:
        if debugging():
            traceback.print_exc()
        print(f"warning: {run_folder.REPORT} was not written ({in_short(error)}); TGDPO_DEBUG=1 shows why.", flush=True)
        return None


def _is_finite(totals: dict[str, float]) -> bool:
    return not totals["not_finite"] and all(map(math.isfinite, totals.values()))


def _check_finite(totals: dict[str, float], what: str, run: Run) -> None:
    if not _is_finite(totals):
        raise NonFiniteError(f"{what} is not finite; {run.saves.what_is_kept()}.")
