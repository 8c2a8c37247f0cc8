"""Turns a checkpoint of Megatron-Bridge, Megatron-LM or NeMo 2 into a HuggingFace folder, bit for bit."""

from __future__ import annotations

from pathlib import Path

from tgdpo_megatron.checkpoint.convert import Stored, export
from tgdpo_megatron.checkpoint.foreign.folder import Foreign
from tgdpo_megatron.checkpoint.foreign.settings import check_family, check_settings, read_settings
from tgdpo_megatron.checkpoint.foreign.tensors import as_ours
from tgdpo_megatron.checkpoint.work import check_target
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.families import family_of, read_description


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
    export(Stored(foreign.given, foreign.weights, index, like), target, dtype, processes)


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
