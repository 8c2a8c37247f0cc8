"""What a program reads: every file it was given, checked before a model exists."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.checkpoint.manifest import HF, CheckpointManifest, describe, read_manifest
from tgdpo_megatron.config import Config
from tgdpo_megatron.data.prepare import PreparedPairs, load_prepared, prepare_pairs
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.model.description import ModelDescription, check_fits
from tgdpo_megatron.platform.processes import Ranks, on_first_rank


@dataclass(frozen=True)
class Models:
    """The checkpoints of a run: where they are, what they are.

    `guidance` is None where the loss takes none.
    """

    description: ModelDescription
    policy: CheckpointManifest
    reference: CheckpointManifest
    guidance: CheckpointManifest | None


def required(value: Path | None, key: str, purpose: str) -> Path:
    """A path the configuration must give.

    Raises:
        UserError: It does not.
    """
    if value is None:
        raise UserError(f"{key} is not set; give {purpose}.")
    return value


def check_models(config: Config) -> Models:
    """Read the manifests of all checkpoints named, and check that they go together and fit the layout.

    Raises:
        UserError: A missing or unusable checkpoint, other tokenizers or templates, other widths.
    """
    policy_folder = required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from")
    policy, description = read_manifest(policy_folder), describe(policy_folder)
    check_fits(description, config.parallel)
    reference = policy
    if config.model.reference is not None:
        reference = _companion(config.model.reference, "reference", policy, description)
    guidance = None
    if config.model.guidance is not None:
        guidance = _companion(config.model.guidance, "guidance", policy, description)
    return Models(description, policy, reference, guidance)


def _companion(
    folder: Path, role: str, policy: CheckpointManifest, description: ModelDescription
) -> CheckpointManifest:
    manifest = read_manifest(folder)
    for field, words in {"tokenizer": "tokenizer", "template": "chat template"}.items():
        if getattr(manifest, field) != getattr(policy, field):
            raise UserError(
                f"{folder}: the {role} has another {words} than the policy; token log-probs would not match."
            )
    if describe(folder).vocab_size != description.vocab_size:
        raise UserError(f"{folder}: the {role} has another vocabulary size than the policy.")
    return manifest


def carried_checkpoints(config: Config) -> list[Path]:
    """The frozen checkpoints that ride with the policy: none where scores are cached or the loss needs none.

    Raises:
        UserError: As check_stackable, or a live TGDPO without a guidance model.
    """
    if config.scores.source == "cached" or not config.loss.needs_reference:
        return []
    check_stackable(config)
    folders = [required(config.reference_checkpoint, "model.checkpoint", "the Megatron checkpoint to start from")]
    if config.loss.needs_guidance:
        purpose = "an aligned checkpoint that guides, or set scores.source=cached"
        folders.append(required(config.model.guidance, "model.guidance", purpose))
    return folders


def check_stackable(config: Config) -> None:
    """Check that all models can go through one pipeline: stacked hidden states need one depth and width.

    Raises:
        UserError: Naming the checkpoint that differs.
    """
    policy = describe(required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from"))
    for folder in (config.model.reference, config.model.guidance):
        if folder is not None and not describe(folder).same_width(policy):
            raise UserError(
                f"{folder}: has another depth or width than model.checkpoint and cannot run beside it; "
                "score it by itself with python -m recipes.score and set scores.source=cached."
            )


def load_data(
    config: Config, description: ModelDescription, ranks: Ranks, folder: Path
) -> tuple[PreparedPairs, PreparedPairs | None]:
    """Tokenise training and validation pairs on the first rank; every rank then reads the result. Collective.

    Args:
        folder: Where the tokenised pairs are kept.

    Raises:
        UserError: What prepare_pairs refuses, or sequences longer than the model's positions.
    """
    train = required(config.data.train, "data.train", "a .json, .jsonl or .parquet file of preference pairs")
    checkpoint = required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from")
    sources = {"train": train} | ({"validation": config.data.validation} if config.data.validation else {})

    def prepare() -> dict[str, Path]:
        tokenizer = load_tokenizer(checkpoint / HF)
        places = {}
        for name, source in sources.items():
            pairs = prepare_pairs(config.data, source, tokenizer, folder / name)
            print(f"data.{name}: {pairs.summary.sentences()}", flush=True)
            if pairs.summary.longest_sequence > description.max_position_embeddings:
                raise UserError(
                    f"{source}: the longest sequence has {pairs.summary.longest_sequence} tokens, the model has "
                    f"{description.max_position_embeddings} positions; lower data.max_length."
                )
            longest, budget = int(pairs.lengths((CHOSEN, REJECTED)).max()), config.train.micro_batch_tokens
            if budget is not None and longest > budget:
                raise UserError(
                    f"{source}: the longest pair has {longest} tokens and does not fit "
                    f"train.micro_batch_tokens={budget}; raise it, or lower data.max_length."
                )
            places[name] = source if source.is_dir() else folder / name
        return places

    places: dict[str, Path] = on_first_rank(ranks, prepare)
    loaded: dict[str, Any] = {name: load_prepared(place) for name, place in places.items()}
    return loaded["train"], loaded.get("validation")


@contextlib.contextmanager
def removed_if_refused(folder: Path, ranks: Ranks) -> Iterator[None]:
    """If the block refuses its input, leave no folder behind that was not there before."""
    was_there = folder.exists()
    try:
        yield
    except UserError:
        if ranks.is_first and not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def check_writable(folder: Path) -> None:
    """Make a folder and try to write into it.

    Raises:
        UserError: It cannot be made or written.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}).") from None
