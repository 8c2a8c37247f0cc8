"""A training run: its pairs, its folder, this rank's part of its models; and how it is prepared for the first step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from tgdpo_megatron import preflight, resuming, run_folder
from tgdpo_megatron.checkpoint import located
from tgdpo_megatron.checkpoint.manifest import CheckpointManifest, read_manifest
from tgdpo_megatron.checkpoint.sources import Source
from tgdpo_megatron.checkpoint.state import load_training_state
from tgdpo_megatron.config import Config, check_batch_layout, on_device, with_steps
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.order import Mix, global_batch, mix_of
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.data.tokenizer import hash_of, template_of
from tgdpo_megatron.engine import Engine, build_engine
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.incidents import Incidents
from tgdpo_megatron.model.build import settle_attention
from tgdpo_megatron.pair_losses import PreferenceLoss, Start, start_of
from tgdpo_megatron.planning.disk import check_disk
from tgdpo_megatron.platform import life
from tgdpo_megatron.platform.checks import check_fp8
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel, on_first_rank
from tgdpo_megatron.report.pace import Pace
from tgdpo_megatron.report.terminal import Loudness
from tgdpo_megatron.run_lock import InUseError, RunLock, take_together
from tgdpo_megatron.saves import Content, Saves


@dataclass(frozen=True)
class Part:
    """Training or validation pairs, with their scores from files where the run reads any."""

    pairs: PreparedPairs
    scores: TokenScores | None

    def micro_batches(self, picked: np.ndarray, config: Config, device: torch.device) -> list[Batch]:
        """This data-parallel rank's micro-batches of some pairs."""
        return rank_batches(
            self.pairs,
            picked,
            config,
            sides=config.loss.method.sides,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            device=device,
            scores=self.scores,
            context_rank=parallel_state.get_context_parallel_rank(),
        )


@dataclass(frozen=True)
class Run:
    """A run whose inputs have passed all checks, with this rank's part of its models.

    Attributes:
        config: The settings, with the number of steps and the number format filled in.
        mix: How often the pairs of each file are seen; None for once in each epoch.
        resumed_from: The checkpoint from which the run continues; None for a new run.
        first: Number of optimizer steps done before.
        was_evaluated: Whether the checkpoint from which the run continues knows the metrics of the held-out pairs.
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
    training: Part
    mix: Mix | None
    validation: Part | None
    resumed_from: Path | None
    first: int
    was_evaluated: bool
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

    def pairs_of(self, iteration: int) -> np.ndarray:
        """The training pairs of an optimizer step, counted from 0."""
        return global_batch(
            iteration,
            num_pairs=len(self.training.pairs),
            global_batch_size=self.config.train.global_batch_size,
            seed=self.config.train.seed,
            shuffle=self.config.data.shuffle,
            mix=self.mix,
        )

    def pace(self, ranks: Ranks) -> Pace:
        """What measures the speed of the run."""
        gpu = torch.cuda.get_device_name() if ranks.device.type == "cuda" else None
        description = self.engine.chunks[0].description
        return Pace(self.config, description, self.training.pairs, ranks=ranks.world_size, gpu=gpu)


@dataclass(frozen=True)
class _Inputs:
    """What a run is made from, once all of it has passed its checks.

    Attributes:
        config: The settings, with the number of steps filled in, and models where they were found.
        frozen: Checkpoints of the models that are carried beside the policy.
        resumed_from: The checkpoint from which the run continues; None for a new run.
        identity: What the run's checkpoints say of it.
        template: The text of a chat template that replaces the tokenizer's own, if any.
    """

    config: Config
    found: dict[str, Source]
    models: preflight.Models
    frozen: list[Path]
    resumed_from: Path | None
    training: Part
    validation: Part | None
    mix: Mix | None
    identity: CheckpointManifest
    template: str | None


@dataclass(frozen=True)
class FinishedRun:
    """A run that had done all its steps before: its last checkpoint, and the lock of its folder, which is held."""

    checkpoint: Path
    lock: RunLock


def prepare(config: Config, ranks: Ranks, loudness: Loudness) -> Run | FinishedRun:
    """Check everything that can be wrong with the inputs, then build this rank's part of the models. Collective.

    Returns:
        The run; or a finished one, for which no model was built.

    Raises:
        UserError: An input cannot be used. A run folder that was not there before is removed again.
    """
    config = on_device(config, ranks.device.type)
    check_batch_layout(config, world_size=ranks.world_size)
    check_fp8(config.train)
    life.at("checking the inputs")
    on_first_rank(ranks, partial(preflight.check_services, config))
    output = preflight.required(config.train.output, "train.output", "a folder for this run")
    is_new = on_first_rank(ranks, lambda: not output.exists())
    with run_folder.removed_if_refused(output, is_first=ranks.is_first):
        lock = RunLock(output)
        take_together(lock, ranks, partial(_open, output, lock, config))
        inputs = _checked(config, output, ranks, quiet=loudness == Loudness.QUIET)
        if inputs.resumed_from is not None and resuming.is_finished(inputs.resumed_from, inputs.config):
            return FinishedRun(inputs.resumed_from, lock)
        return _built(inputs, output, ranks, lock, is_new=is_new)


def _checked(config: Config, output: Path, ranks: Ranks, *, quiet: bool) -> _Inputs:
    """Find, read and check the run's models, pairs and scores, and that it may go on where it is to. Collective.

    Raises:
        UserError: As prepare.
    """
    resumed_from = resuming.find_start(output, ranks) if config.train.resume else None
    run_folder.keep_output(output, ranks.rank)
    commits = run_folder.kept_commits(output if resumed_from else None)
    config = run_folder.with_kept_data(config, output if resumed_from else None)
    config, found = located.models_on_every_rank(config, ranks, commits, quiet=quiet)
    with located.named_as_given(config, found):
        models = preflight.check_models(config)
        frozen = preflight.carried_checkpoints(config)
    config, change = settle_attention(config, models.description)
    if change and ranks.is_first:
        print(f"warning: {change}.", flush=True)
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
    return _Inputs(
        config=config,
        found=found,
        models=models,
        frozen=frozen,
        resumed_from=resumed_from,
        training=Part(pairs, scores),
        validation=Part(validation, validation_scores) if validation is not None else None,
        mix=mix,
        identity=identity,
        template=template,
    )


def _built(inputs: _Inputs, output: Path, ranks: Ranks, lock: RunLock, *, is_new: bool) -> Run:
    """Build this rank's part of the models, and load the checkpoint from which the run continues. Collective.

    Raises:
        UserError: The checkpoints of the run would not fit the disk.
    """
    config, models, resumed_from = inputs.config, inputs.models, inputs.resumed_from
    on_first_rank(ranks, partial(check_disk, output, config, models.description))
    initialize_model_parallel(config.parallel, config.train.seed)
    life.at("building and loading the models")
    engine = build_engine(
        config,
        models.description,
        loss=PreferenceLoss(config),
        start=None if resumed_from else start_of_training(config),
        frozen=inputs.frozen,
    )
    before = read_manifest(resumed_from, with_index=False) if resumed_from else None
    first = (before.iteration if before else None) or 0
    if resumed_from is not None:
        load_training_state(resumed_from, engine.chunks, engine.optimizer, engine.scheduler)
    settings = run_folder.settings_text(config, inputs.found)
    saves = Saves(
        output, config, engine, Content(inputs.identity, start_of_training(config), inputs.template, settings)
    )
    incidents = Incidents(
        output,
        config,
        engine,
        inputs.training.pairs,
        lambda picked: inputs.training.micro_batches(picked, config, ranks.device),
        saves.what_is_kept,
        first=first,
        ranks=ranks,
    )
    return Run(
        config=config,
        output=output,
        engine=engine,
        training=inputs.training,
        mix=inputs.mix,
        validation=inputs.validation,
        resumed_from=resumed_from,
        first=first,
        was_evaluated=before is not None and before.held_out is not None,
        start=start_of(config.loss) if models.policy.weights == models.reference.weights else None,
        is_new=is_new,
        found=inputs.found,
        saves=saves,
        incidents=incidents,
        lock=lock,
    )


def _open(output: Path, lock: RunLock, config: Config) -> None:
    """Take the folder of the run for this job. Called on the first rank.

    Raises:
        InUseError: Another job works there, or has used the folder.
        UserError: As check_output.
    """
    if not lock.path.exists():  # a folder that is no run's is left as it was
        run_folder.check_output(output, config)
        lock.take()
    else:
        lock.take()  # first: that a run is under way is said before anything else
    try:
        run_folder.check_output(output, config)  # once more: a job that has just ended may have used the folder
    except UserError as error:
        raise InUseError(str(error)) from None  # so that nobody removes what is another job's


def start_of_training(config: Config) -> Path:
    """The checkpoint whose model is trained."""
    return preflight.required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from")


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
