"""What a program reads: every file it was given, checked before a model exists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.checkpoint.manifest import HF, CheckpointManifest, describe, read_manifest
from tgdpo_megatron.config import Config
from tgdpo_megatron.data.prepare import PreparedPairs, load_prepared, prepare_pairs, source_hash
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.model.description import ModelDescription, check_model_layout
from tgdpo_megatron.platform.processes import Ranks, on_first_rank
from tgdpo_megatron.scores.store import (
    NAMES,
    ScoresManifest,
    TokenScores,
    check_belongs,
    load_scores,
    read_scores_manifest,
)


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
    check_model_layout(description, config.parallel)
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
    """Check that all models can go through one pipeline, stacked.

    Raises:
        UserError: Naming the checkpoint that differs.
    """
    policy = describe(required(config.model.checkpoint, "model.checkpoint", "the Megatron checkpoint to start from"))
    for folder in (config.model.reference, config.model.guidance):
        if folder is not None and (differs := describe(folder).differs_from(policy)):
            raise UserError(
                f"{folder}: differs from model.checkpoint in {', '.join(differs)} and cannot run beside it; "
                "score it into a cache with python -m recipes.score and set scores.source=cached."
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
            place = source if source.is_dir() else folder / f"{name}-{source_hash(config.data, source, tokenizer)[:12]}"
            pairs = prepare_pairs(config.data, source, tokenizer, place)
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
                    f"train.micro_batch_tokens={budget}; raise it to {longest} or more, or lower data.max_length."
                )
            places[name] = place
        return places

    places: dict[str, Path] = on_first_rank(ranks, prepare)
    loaded: dict[str, Any] = {name: load_prepared(place) for name, place in places.items()}
    return loaded["train"], loaded.get("validation")


def load_cached_scores(
    config: Config, models: Models, data: PreparedPairs, validation: PreparedPairs | None
) -> tuple[TokenScores | None, TokenScores | None]:
    """Read the cached scores of training and validation pairs, where a run asks for them.

    Raises:
        UserError: No scores there, scores made from something else, or without what the loss needs.
    """
    if config.scores.source == "live" or not config.loss.needs_reference:
        return None, None
    folder = required(config.scores.path, "scores.path", "the folder python -m recipes.score wrote")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of token scores; write it with python -m recipes.score.")
    loaded: list[TokenScores | None] = []
    for name, pairs in (("train", data), ("validation", validation)):
        if pairs is None:
            loaded.append(None)
            continue
        found = read_scores_manifest(folder / name)
        expected = scores_manifest(config, models, pairs)
        check_belongs(found, expected, folder / name)
        if config.loss.needs_guidance and found.guidance is None:
            raise UserError(
                f"{folder / name}: holds no guidance scores, which loss.type={config.loss.type} needs; "
                "score again with model.guidance set."
            )
        loaded.append(load_scores(folder / name, pairs, NAMES if config.loss.needs_guidance else NAMES[:1]))
    return loaded[0], loaded[1]


def scores_manifest(config: Config, models: Models, pairs: PreparedPairs) -> ScoresManifest:
    """What scores of these pairs depend on."""
    return ScoresManifest(
        reference=models.reference.weights,
        guidance=models.guidance.weights if models.guidance else None,
        tokenizer=pairs.summary.tokenizer,
        template=pairs.summary.template,
        max_length=pairs.summary.max_length,
        pairs_hash=pairs.summary.pairs_hash,
        precision=config.train.precision,
    )
