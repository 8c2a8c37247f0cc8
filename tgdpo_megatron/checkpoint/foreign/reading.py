"""Turns a checkpoint of Megatron-Bridge, Megatron-LM or NeMo 2 into a HuggingFace folder, bit for bit, or through one
into a checkpoint of this project."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from tgdpo_megatron.checkpoint.convert import Stored, export, hf_to_megatron
from tgdpo_megatron.checkpoint.failures import InterruptedWorkError
from tgdpo_megatron.checkpoint.foreign.folder import Foreign
from tgdpo_megatron.checkpoint.foreign.settings import check_family, check_settings, read_settings
from tgdpo_megatron.checkpoint.foreign.tensors import as_ours
from tgdpo_megatron.checkpoint.index import Index
from tgdpo_megatron.checkpoint.manifest import COMPANIONS, CheckpointManifest
from tgdpo_megatron.checkpoint.work import check_target
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.families import family_of, read_description
from tgdpo_megatron.model.families.decoder import VOCABULARY

PADDED = 128
"""The multiple that Megatron pads the vocabulary of each tensor-parallel rank to, where nothing else is said."""


def foreign_to_hf(
    foreign: Foreign, target: Path, like: Path | None, *, dtype: str | None = None, processes: int = 1
) -> None:
    """Convert a foreign checkpoint to a HuggingFace folder.

    Args:
        target: Folder to make. It must not exist, or be empty.
        like: HuggingFace folder with the config.json and the tokenizer of the model. It needs no weights.
        dtype: `bf16` or `fp32`; default: each tensor as stored.
        processes: How many share the work.

    Raises:
        UserError: No `like`; settings, weights or a tokenizer that are not those of `like`; or what export refuses.
    """
    check_target(target)
    settings, where = read_settings(foreign), foreign.settings
    check_family(settings, where)
    if like is None:
        raise UserError(
            f"{foreign.given}: give with --like the HuggingFace model that this checkpoint of {foreign.program} was "
            f"made from{_named(settings)}; its config.json and its tokenizer are taken."
        )
    description = read_description(like)
    check_settings(settings, where, description, like)
    _check_tokenizer(foreign, like)
    index = as_ours(foreign, family_of(description).tensors(description), like)
    if foreign.cut_short is not None:
        print(f"{foreign.cut_short}: is not whole; {foreign.weights} is read instead.", file=sys.stderr)
    _check_padding(foreign, settings, index, description.vocab_size, like)
    export(Stored(foreign.given, foreign.weights, index, like), target, dtype, processes)


def foreign_to_megatron(
    foreign: Foreign, target: Path, like: Path | None, *, dtype: str | None, processes: int, certificate: bool
) -> CheckpointManifest:
    """Convert a foreign checkpoint to one of this project, through a HuggingFace folder beside it.

    The certificate compares with HuggingFace's model, so that folder is needed in any case. It is removed when all is
    done or refused. Where the work was interrupted it stays, and the same call goes on from it.

    Args: As foreign_to_hf and hf_to_megatron.

    Raises:
        UserError: What either of them refuses.
    """
    check_target(target)
    between = target.with_name(f"{target.name}.{_digest(foreign, like)}.hf")
    if not between.is_dir():
        foreign_to_hf(foreign, between, like, processes=processes)
    try:
        manifest = hf_to_megatron(between, target, dtype=dtype, processes=processes, certificate=certificate)
    except UserError as error:
        if not isinstance(error, InterruptedWorkError):
            shutil.rmtree(between, ignore_errors=True)
        raise
    shutil.rmtree(between, ignore_errors=True)
    return manifest


def _digest(foreign: Foreign, like: Path | None) -> str:
    """What a HuggingFace folder is made of, in short: files by their name, size and time."""
    files = [*sorted(foreign.weights.iterdir()), foreign.settings]
    files += [like / name for name in COMPANIONS] if like is not None else []
    known = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


def _check_padding(foreign: Foreign, settings: dict[str, Any], index: Index, vocabulary: int, like: Path) -> None:
    """Refuse more rows after the vocabulary than Megatron ever pads it with, and tell of those that are left out.

    Which of fewer rows are tokens that were added, only the tokenizer can tell.

    Args:
        settings: The checkpoint's.
        vocabulary: Tokens of the model in `like`.

    Raises:
        UserError: They are the rows of other tokens.
    """
    stored = max((index[key] for key in VOCABULARY if key in index), key=lambda found: found.shape[:1])
    rows = math.prod(stored.shape[:1])
    # What NeMo 2 notes of the layout may be older than the training; each rank saved a block of rows.
    ranks = max(_number(settings, "tensor_model_parallel_size", 1), len(stored.blocks))
    multiple = ranks * _number(settings, "make_vocab_size_divisible_by", PADDED)
    if rows - vocabulary >= multiple:
        raise UserError(
            f"{foreign.given}: its vocabulary has {rows:,} rows, but {like / 'config.json'} describes {vocabulary:,}, "
            f"and padding would be fewer than {multiple:,} more; give with --like the model with the tokens that were "
            "added."
        )
    if rows > vocabulary:
        print(
            f"{foreign.given}: of {rows:,} rows of the vocabulary the last {rows - vocabulary:,} are left out as "
            "padding.",
            file=sys.stderr,
        )


def _number(settings: dict[str, Any], name: str, default: int) -> int:
    """A setting that is a number above 0; else its default."""
    found = settings.get(name)
    return found if type(found) is int and found > 0 else default


def _named(settings: dict[str, object]) -> str:
    """The HuggingFace model that Megatron-Bridge noted, in words; empty where there is none."""
    more = settings.get("extra_checkpoint_metadata")
    named = settings.get("hf_model_id") or (more.get("hf_model_id") if isinstance(more, dict) else None)
    return f", which it says was {named[:200]}" if isinstance(named, str) else ""


def _check_tokenizer(foreign: Foreign, like: Path) -> None:
    """Refuse a tokenizer beside the checkpoint that is not the one beside config.json.

    Raises:
        UserError: They give a token another id.
    """
    if foreign.tokenizer is None or not (like / "tokenizer.json").is_file():
        return
    theirs, ours = (load_tokenizer(folder).get_vocab() for folder in (foreign.tokenizer, like))
    if differing := sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)):
        more = f" and {len(differing) - 1} more tokens" if len(differing) > 1 else ""
        raise UserError(
            f"{foreign.tokenizer}: gives {differing[0]!r:.80}{more} another id than the tokenizer in {like}; give with "
            "--like a folder that holds the tokenizer that the checkpoint was trained with."
        )
