"""What a program reads: every file it was given, checked before a model exists."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tgdpo_megatron import run_folder
from tgdpo_megatron.checkpoint.located import certified, find_models, with_folders
from tgdpo_megatron.checkpoint.manifest import HF, CheckpointManifest, describe
from tgdpo_megatron.checkpoint.sources import Source
from tgdpo_megatron.config import Config, required
from tgdpo_megatron.config.constants import round_up
from tgdpo_megatron.data.formats import read_pairs
from tgdpo_megatron.data.order import mix_of
from tgdpo_megatron.data.parts import prepare_parts
from tgdpo_megatron.data.prepare import PreparedPairs, is_prepared, load_prepared
from tgdpo_megatron.data.read import source_files
from tgdpo_megatron.data.shared_prompts import tokens_read
from tgdpo_megatron.data.token_scores import ScoresManifest, TokenScores
from tgdpo_megatron.data.tokenizer import template_of, tokenizer_for
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription, check_fp8_sizes, check_model_layout
from tgdpo_megatron.scores.contrastive import read_prompts
from tgdpo_megatron.scores.reward_file import read_reward_file
from tgdpo_megatron.scores.store import check_belongs, load_scores, read_scores_manifest

if TYPE_CHECKING:
    from tgdpo_megatron.platform.processes import Ranks


@dataclass(frozen=True)
class Models:
    """The checkpoints of a run: where they are, what they are.

    `guidance` is None where model.guidance is not set.
    """

    description: ModelDescription
    policy: CheckpointManifest
    reference: CheckpointManifest
    guidance: CheckpointManifest | None


PAIRS = "a file of preference pairs, a saved datasets folder, or a data set on a hub"
"""What data.train asks for."""
SMALL_SOURCE = 64 * 2**20
"""Largest size in bytes of a source of pairs that is read once more before torch is loaded."""


def check_files(config: Config, *, batch: int | None = None) -> None:
    """Check what can be checked of all input files before torch is loaded, which takes seconds.

    Models and data sets on a hub are downloaded for it.

    Args:
        batch: Pairs of an optimizer step, for a training.

    Raises:
        UserError: A model, a file of pairs or rewards, or a template that is missing or cannot be used.
    """
    goes_on_in = config.scores.path if batch is None else config.train.output if config.train.resume else None
    found = find_and_check_models(config, run_folder.kept_commits(goes_on_in))
    if batch is not None:
        check_services(config)
        carried_checkpoints(with_folders(config, {role: source.folder for role, source in found.items()}))
        required(config.train.output, "train.output", "a folder for this run")
        config = run_folder.with_kept_data(config, goes_on_in)
    check_pairs(config, batch=batch)
    for name in ("reward_file", "validation_reward_file", "contrastive_prompts"):
        path = getattr(config.scores, name)
        if path is not None and not path.is_file():
            raise UserError(f"scores.{name}={path}: no such file.")
    if batch is not None and config.scores.cached and config.loss.log_prob_scores:
        read_scores_manifest(
            required(config.scores.path, "scores.path", "the folder python -m recipes.score wrote") / "train"
        )


def check_services(config: Config) -> None:
    """Refuse to start without the package of a service that gets the metrics.

    Raises:
        UserError: It is not installed.
    """
    for name, package in {"wandb_project": "wandb", "mlflow_experiment": "mlflow"}.items():
        value = getattr(config.report, name)
        found = importlib.util.find_spec(package)
        if value is not None and (found is None or found.origin is None):  # a folder of that name is no package
            raise UserError(
                f"report.{name}={value} needs the package {package}, which is not installed; type "
                f"pip install '.[{package}]' in the repository, or leave report.{name} out."
            )


def _check_train_is_given(config: Config) -> None:
    given = next(iter(config.data.sources), None)
    required(given, "data.train", PAIRS)


def _count_early(config: Config, source: Path) -> int | None:
    """Read a source of pairs and count them; None where that is left for later."""
    if is_prepared(source) or sum(file.stat().st_size for file in source_files(source)) > SMALL_SOURCE:
        return None
    return len(read_pairs(source, config.data.format, config.data.columns).pairs)


def check_pairs(config: Config, *, batch: int | None = None) -> None:
    """Check the files of pairs, and the template, before torch is loaded.

    Args:
        batch: As for check_files.

    Raises:
        UserError: A file that is missing or cannot be read, or fewer pairs than a batch takes.
    """
    _check_train_is_given(config)
    template_of(config.data.template)
    counts = [_count_early(config, source) for source in config.data.sources]
    if config.data.validation is not None:
        _count_early(config, config.data.validation)
    if batch is not None and None not in counts:
        check_batch_fits(config, [count for count in counts if count is not None], batch)


def check_batch_fits(config: Config, counts: Sequence[int], batch: int) -> None:
    """Refuse an optimizer step of more pairs than an epoch has.

    Args:
        counts: Number of pairs of each file.
    """
    mix = mix_of(counts, config.data.weights)
    if mix and 0 in mix.shares:
        place = mix.shares.index(0)
        raise UserError(
            f"data.weights: {mix.weights[place]} of the {counts[place]} pairs of {config.data.sources[place]} is "
            "less than one pair in an epoch; raise the weight, or leave the file out."
        )
    pairs = mix.epoch_size if mix else sum(counts)
    if batch > pairs:
        files = " and ".join(map(str, config.data.sources))
        raise UserError(f"train.global_batch_size={batch} is more than the {pairs} pairs of {files}; lower it.")


def find_and_check_models(config: Config, commits: Mapping[str, str] | None = None) -> dict[str, Source]:
    """Find every model that the configuration names, and check what can be checked before a conversion.

    Args:
        commits: As find_models.

    Returns:
        Role -> where the model was found.

    Raises:
        UserError: A model that is missing or cannot be used, or does not fit the layout or the others.
    """
    found = find_models(config, commits)
    if all(source.is_converted for source in found.values()):
        check_models(with_folders(config, {role: source.folder for role, source in found.items()}), with_index=False)
    return found


def check_models(config: Config, *, with_index: bool = True) -> Models:
    """Read the manifests of all checkpoints named, and check that they go together and fit the layout.

    Args:
        with_index: As read_manifest.

    Raises:
        UserError: A missing or unusable checkpoint, other tokenizers or templates.
    """
    policy_folder = required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from")
    policy, description = certified(policy_folder, config, with_index=with_index), describe(policy_folder)
    check_model_layout(description, config.parallel)
    check_fp8_sizes(description, config)
    reference = policy
    if config.model.reference is not None:
        reference = _companion(config.model.reference, "reference", policy, config, with_index)
    guidance = None
    if config.model.guidance is not None:
        guidance = _companion(config.model.guidance, "guidance", policy, config, with_index)
    return Models(description, policy, reference, guidance)


def _companion(
    folder: Path, role: str, policy: CheckpointManifest, config: Config, with_index: bool
) -> CheckpointManifest:
    """A frozen checkpoint. The number of embedding rows may differ: that is padding, the tokenizer is what counts.

    Where data.template gives the template, that of a checkpoint is not used and need not be the same.
    """
    manifest = certified(folder, config, with_index=with_index)
    same = {"tokenizer": "tokenizer"} | ({"template": "chat template"} if config.data.template is None else {})
    for field, words in same.items():
        if getattr(manifest, field) != getattr(policy, field):
            raise UserError(
                f"{folder}: the {role} has another {words} than the policy; token log-probs would not match."
            )
    given, now = manifest.chat_template_kwargs, config.data.chat_template_kwargs
    if given is not None and given != now:
        raise UserError(
            f"{folder}: the {role} was trained with data.chat_template_kwargs={json.dumps(given)} and this run has "
            f"{json.dumps(now)}; token log-probs would not match."
        )
    return manifest


def carried_checkpoints(config: Config) -> list[Path]:
    """The frozen checkpoints that ride with the policy: none where scores are cached or the loss needs none.

    Raises:
        UserError: A checkpoint of another shape than the policy; a live guidance that is not given; a method that can
            only be live, or only cached.
    """
    loss, live = config.loss, not config.scores.cached
    if not live:
        check_cacheable(config)
    if not live and not loss.log_prob_scores:
        raise UserError(f"loss.type={loss.type} reads no cached scores; leave scores.source and scores.path out.")
    if live and config.scores.path is not None:
        raise UserError(
            f"scores.path={config.scores.path} is not read with scores.source=live; set scores.source=cached, or leave "
            "the path out."
        )
    if live and "better" in loss.scores:
        raise UserError(
            f"loss.type={loss.type} takes its token rewards from contrastive prompts, which are scored before "
            "training; run python -m recipes.score and set scores.source=cached."
        )
    if not live or not loss.carried:
        return []
    folders = [required(config.reference_checkpoint, "model.checkpoint", "the Megatron checkpoint to start from")]
    if "guidance" in loss.carried:
        purpose = f"the aligned checkpoint that gives loss.type={loss.type} its token rewards, or set " + (
            "scores.source=cached if it was scored, or take them from elsewhere with loss.token_rewards"
        )
        folders.append(required(config.model.guidance, "model.guidance", purpose))
    _check_stackable(folders, config)
    return folders


def check_cacheable(config: Config) -> None:
    """Refuse a method that no cache can serve.

    Raises:
        UserError: It needs more than one number for each token.
    """
    if "divergence" in config.loss.method.reads:
        raise UserError(
            f"loss.type={config.loss.type} needs the reference's whole distribution at every token, which no cache "
            "holds; leave scores.source and scores.path out."
        )


def _check_stackable(folders: list[Path], config: Config) -> None:
    """Check that frozen models can go through the policy's pipeline, stacked."""
    policy = describe(required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from"))
    for folder in folders:
        if differs := describe(folder).differs_from(policy):
            raise UserError(
                f"{folder}: differs from model.checkpoint in {', '.join(differs)} and cannot run beside it; "
                "score it into a cache with python -m recipes.score and set scores.source=cached."
            )


def load_data(
    config: Config, description: ModelDescription, ranks: Ranks, folder: Path, *, quiet: bool = False
) -> tuple[PreparedPairs, PreparedPairs | None]:
    """Tokenise training and validation pairs on the first rank; every rank then reads the result. Collective.

    Args:
        folder: Where the tokenised pairs are kept.
        quiet: Whether to leave out how each file was read.

    Raises:
        UserError: What prepare_pairs refuses, or sequences longer than the model's positions.
    """
    from tgdpo_megatron.platform.processes import on_first_rank  # late: it loads torch

    _check_train_is_given(config)
    checkpoint = required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from")

    def prepare() -> dict[str, Path]:
        places = prepare_parts(config.data, tokenizer_for(checkpoint / HF, config.data), folder, quiet=quiet)
        for place in places.values():
            pairs = load_prepared(place)
            if pairs.summary.longest_sequence > description.max_position_embeddings:
                raise UserError(
                    f"{pairs.summary.source}: the longest sequence has {pairs.summary.longest_sequence} tokens, the "
                    f"model has {description.max_position_embeddings} positions; lower data.max_length."
                )
            _check_budget(config, pairs, Path(pairs.summary.source))
        return places

    places: dict[str, Path] = on_first_rank(ranks, prepare)
    loaded: dict[str, Any] = {name: load_prepared(place) for name, place in places.items()}
    return loaded["train"], loaded.get("validation")


def _check_budget(config: Config, pairs: PreparedPairs, source: Path) -> None:
    """Refuse a train.micro_batch_tokens that some pair does not fit."""
    budget, sides = config.train.micro_batch_tokens, config.loss.method.sides
    lengths = pairs.lengths(sides)
    if budget is None or int(lengths.max()) <= budget:
        return
    long = np.flatnonzero(lengths > budget)
    lengths = tokens_read(pairs, long, sides, shared_prompts=config.train.shared_prompts)
    longest = int(lengths.max())
    if longest <= budget:
        return
    enough = round_up(longest, config.token_multiple)
    raise UserError(
        f"{source}: the longest pair ({pairs.name(int(long[lengths.argmax()]))}) has {longest} tokens and does not fit "
        f"train.micro_batch_tokens={budget}; raise it to {enough} or more, or lower data.max_length."
    )


def load_scores_of(
    config: Config, models: Models, data: PreparedPairs, validation: PreparedPairs | None
) -> tuple[TokenScores | None, TokenScores | None]:
    """Read what a run takes from files: cached scores of training and validation pairs, and a reward file.

    Raises:
        UserError: No scores there, scores made from something else, or without what the loss needs.
    """
    return (
        scores_of_part(config, models, "train", data),
        scores_of_part(config, models, "validation", validation) if validation is not None else None,
    )


def scores_of_part(config: Config, models: Models, part: str, pairs: PreparedPairs) -> TokenScores | None:
    """The scores of `train` or `validation` pairs that a run takes from files; None where it takes none.

    Raises:
        UserError: As load_scores_of.
    """
    cached = config.loss.log_prob_scores if config.scores.cached else ()
    if not cached and "reward" not in config.loss.scores:
        return None
    values: dict[str, Any] = {}
    found = None
    if cached:
        folder = required(config.scores.path, "scores.path", "the folder python -m recipes.score wrote") / part
        found = read_scores_manifest(folder)
        check_belongs(found, scores_manifest(config, models, pairs), folder)
        values |= load_scores(folder, pairs, cached).values
    if "reward" in config.loss.scores:
        name = "reward_file" if part == "train" or config.data.validation_share else "validation_reward_file"
        path = required(getattr(config.scores, name), f"scores.{name}", "a .jsonl file of token rewards")
        checkpoint = required(config.model.checkpoint, "model.checkpoint", "the checkpoint to start from")
        values["reward"] = read_reward_file(path, pairs, tokenizer_for(checkpoint / HF, config.data))
    return TokenScores.of(pairs, values, found)


def scores_manifest(config: Config, models: Models, pairs: PreparedPairs) -> ScoresManifest:
    """What the cached scores that the loss needs depend on."""
    names = config.loss.scores
    return ScoresManifest(
        tokenizer=pairs.summary.tokenizer,
        template=pairs.summary.template,
        chat_template_kwargs=pairs.summary.chat_template_kwargs,
        max_length=pairs.summary.max_length,
        precision=config.train.precision,
        reference=models.reference.weights if "reference" in config.loss.frozen_models else None,
        # A run may use cached guidance scores without having the guidance model.
        guidance=models.guidance.weights if "guidance" in names and models.guidance else None,
        prompts=read_prompts(config.scores.contrastive_prompts).hash if "better" in names else None,
    )
