"""A checkpoint folder: Megatron weights, with what identifies them and what an export to HuggingFace needs.

FOLDER/manifest.json   identity of the weights: a folder without it is not a checkpoint
FOLDER/SHA256SUMS      checksums of all files, for a run; see sums.py
FOLDER/config.yaml     settings, for a run
FOLDER/hf/             config.json and tokenizer of the HuggingFace model
FOLDER/weights/        torch_dist checkpoint: weights and, for a run, optimizer state
"""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tgdpo_megatron.bounded import parse_json, read_text
from tgdpo_megatron.checkpoint.foreign.folder import find_foreign
from tgdpo_megatron.checkpoint.index import read_index
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import read_description

FORMAT = 2
WEIGHTS, HF, SETTINGS = "weights", "hf", "config.yaml"

# Files of a HuggingFace folder that are not weights and may be needed to use the model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_MORE_TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's other templates, such as one for tools."""


def is_companion(name: str) -> bool:
    """Whether a file of a HuggingFace folder, named relative to it, is one that is kept beside the weights."""
    folder, _, file = name.rpartition("/")
    return file.endswith(".jinja") if folder == _MORE_TEMPLATES else name in COMPANIONS


def companions(folder: Path) -> list[str]:
    """The names of all files of a HuggingFace folder that are kept beside the weights, relative to it. Sorted."""
    files = (*folder.iterdir(), *(folder / _MORE_TEMPLATES).glob("*"))
    names = (str(file.relative_to(folder)) for file in files if file.is_file())
    return sorted(name for name in names if is_companion(name))


@dataclass(frozen=True)
class CheckpointManifest:
    """The identity of a checkpoint."""

    weights: str
    """Fingerprint of the weights, the same at every layout."""
    dtype: str
    """Dtype of the stored weights: `bfloat16`, `float32` or `float16`."""
    tokenizer: str | None
    """tokenizer_hash, or None where the model came without a tokenizer."""
    template: str | None
    """Hash of the chat template that the checkpoint carries, or None where the model came without a tokenizer."""
    iteration: int | None = None
    """Optimizer steps, for a checkpoint of a run."""
    reference: str | None = None
    """Fingerprint of the run's reference weights, for a checkpoint of a run."""
    guidance: str | None = None
    """Fingerprint of the run's guidance weights."""
    pairs_hash: str | None = None
    """Hash of the run's training pairs."""
    rewards: str | None = None
    """Hash of the contrastive prompts, or of the reward file, that the run's token rewards come from."""
    chat_template_kwargs: dict[str, Any] | None = None
    """The run's data.chat_template_kwargs, which whoever uses the model has to give the template again. None for a
    checkpoint that was converted."""
    weights_bf16: str = ""
    """Fingerprint of the weights rounded to bf16, which is how a bf16 run loads them."""
    weights_only: bool = False
    """Whether a run left its optimizer state out. It cannot go on from here then."""
    held_out: dict[str, float] | None = None
    """The run's metrics of the held-out pairs after this step, where they were evaluated. They begin with `eval/`."""
    sums: str | None = None
    """Name of the file with the checksums. None for a checkpoint that was converted, or saved by an earlier version."""
    format: int = FORMAT


def read_manifest(folder: Path, *, with_index: bool = True) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Args:
        with_index: Whether to read the index of the weights as well, which is long for a large model.

    Raises:
        UserError: No such folder, a HuggingFace folder that was not converted, or an unfinished or damaged checkpoint.
    """
    if folder.is_file():
        find_foreign(folder)  # which refuses NeMo 1's archives in a sentence of their own
        raise UserError(f"{folder}: is a file, not the folder of a model.")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder.")
    path = folder / "manifest.json"
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: this is a HuggingFace model; convert it with "
                "python -m tools.convert_hf_to_megatron HF_FOLDER MEGATRON_FOLDER."
            )
        if (folder / "checkpoints").is_dir():
            raise UserError(f"{folder}: this is the folder of a run; name one of its {folder / 'checkpoints'}.")
        if foreign := find_foreign(folder):
            raise UserError(
                f"{folder}: this is a checkpoint of {foreign.program}; make a HuggingFace model of it with python -m "
                f"tools.convert_megatron_to_hf {folder} HF_FOLDER --like MODEL, and give that."
            )
        raise UserError(
            f"{folder}: neither a HuggingFace model (no config.json) nor a Megatron checkpoint of this project (no "
            "manifest.json)."
        )
    text = read_text(path, what="checkpoint manifest")
    try:
        manifest = CheckpointManifest(**parse_json(text, where=str(path)))
    except (TypeError, UserError):
        raise UserError(f"{path}: not a checkpoint manifest; convert the model again.") from None
    if wrong := wrong_field(manifest):
        raise UserError(f"{path}: {wrong} cannot be {getattr(manifest, wrong)!r:.50}; convert the model again.")
    if manifest.format != FORMAT:
        raise UserError(
            f"{path}: the checkpoint has format {manifest.format}, but this version reads format {FORMAT}; convert the "
            "model again."
        )
    if not (folder / WEIGHTS / ".metadata").is_file():
        raise UserError(f"{folder}: the checkpoint has no weights.")
    if with_index:
        read_index(folder / WEIGHTS)
    return manifest


def wrong_field(record: object) -> str | None:
    """The name of a dataclass's field whose value is not of the type declared for it, or is an integer below zero."""
    for name, kinds in _kinds(type(record)).items():  # type: ignore[arg-type]  # mypy knows no hash of a class
        value = getattr(record, name)
        is_flag = isinstance(value, bool)
        if not isinstance(value, kinds) or (is_flag and bool not in kinds) or (isinstance(value, int) and value < 0):
            return name
    return None


@functools.cache
def _kinds(record: type) -> dict[str, tuple[type, ...]]:
    """The types that the fields of a dataclass may have."""
    found = {}
    for name, declared in get_type_hints(record).items():
        parts = get_args(declared) if isinstance(declared, UnionType) else (declared,)
        found[name] = tuple(get_origin(part) or part for part in parts)
    return found


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest. It must be the last file written to a checkpoint that is not renamed when it is whole."""
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2), encoding="utf-8")


def hf_folder(folder: Path) -> Path:
    """The folder that holds config.json and the tokenizer of a checkpoint, or of a HuggingFace folder: that itself."""
    return folder / HF if (folder / "manifest.json").is_file() else folder


def describe(folder: Path) -> ModelDescription:
    """Shape of the model in a checkpoint folder, or in a HuggingFace folder."""
    return read_description(hf_folder(folder))


def copy_companions(source: Path, target: Path, template: str | None = None) -> None:
    """Copy the config and tokenizer files of a HuggingFace folder.

    Args:
        template: Text of a chat template that takes the place of the tokenizer's own.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in companions(source):
        if template is not None and name not in COMPANIONS:
            continue
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    if template is None:
        return
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = target / "tokenizer_config.json"
    if settings.is_file():  # an older tokenizer has its template in here
        content = json.loads(settings.read_text(encoding="utf-8"))
        content.pop("chat_template", None)
        settings.write_text(json.dumps(content, indent=2), encoding="utf-8")
