"""A checkpoint folder: Megatron weights, with what identifies them and what an export to HuggingFace needs.

FOLDER/manifest.json   identity of the weights, written last: a folder without it is not a checkpoint
FOLDER/hf/             config.json and tokenizer of the HuggingFace model
FOLDER/weights/        torch_dist checkpoint: weights and, for a run, optimizer state
"""

from __future__ import annotations

import enum
import json
import pickle
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError, in_short
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import read_description

FORMAT = 2
WEIGHTS, HF = "weights", "hf"

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
    format: int = FORMAT


def read_manifest(folder: Path, *, with_index: bool = True) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Args:
        with_index: Whether to check the index of the weights as well, for which torch is loaded.

    Raises:
        UserError: No such folder, a HuggingFace folder that was not converted, or an unfinished or damaged checkpoint.
    """
    if folder.is_file():
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
        raise UserError(
            f"{folder}: neither a HuggingFace model (no config.json) nor a Megatron checkpoint of this project (no "
            "manifest.json)."
        )
    try:
        manifest = CheckpointManifest(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise UserError(f"{path}: not a checkpoint manifest; convert the model again.") from None
    if manifest.format != FORMAT:
        raise UserError(
            f"{path}: the checkpoint has format {manifest.format}, but this version reads format {FORMAT}; convert the "
            "model again."
        )
    if not (folder / WEIGHTS / ".metadata").is_file():
        raise UserError(f"{folder}: the checkpoint has no weights.")
    if with_index:
        read_metadata(folder / WEIGHTS)
    return manifest


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest. It must be the last file written to a checkpoint."""
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2), encoding="utf-8")


def hf_folder(folder: Path) -> Path:
    """The folder that holds config.json and the tokenizer of a checkpoint, or of a HuggingFace folder: that itself."""
    return folder / HF if (folder / "manifest.json").is_file() else folder


def describe(folder: Path) -> ModelDescription:
    """Shape of the model in a checkpoint folder, or in a HuggingFace folder."""
    return read_description(hf_folder(folder))


def read_metadata(folder: Path) -> Any:
    """The index of a torch_dist checkpoint.

    torch writes the index as a pickle, and loading a pickle can run code. This function accepts only the classes that
    an index is made of. It is called before torch loads the index, so that a checkpoint from elsewhere cannot run code.

    Raises:
        UserError: The index is damaged, or names anything else.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            return _IndexUnpickler(file).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: the checkpoint's index is damaged ({in_short(error)}).") from error


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how some releases of Python pickle a member of an enum
            return _enum_member
        if (module, name) in _INDEX_PARTS or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        if module.startswith(("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")):
            found = super().find_class(module, name)
            # A class that is defined in that module, not imported there.
            if isinstance(found, type) and (found.__module__, found.__name__) == (module, name):
                return found
        raise UserError(
            f"the checkpoint's index names {module}.{name}, which no index holds; the checkpoint is not loaded."
        )


_INDEX_PARTS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
}


def _enum_member(owner: Any, name: str) -> Any:
    """Takes the place of getattr while an index is read: gives a member of an enum, and nothing else."""
    if isinstance(owner, enum.EnumMeta) and name in owner.__members__:
        return owner.__members__[name]
    raise UserError(f"the checkpoint's index looks up {name}, which no index does; the checkpoint is not loaded.")


def _is_dtype(name: str) -> bool:
    import torch  # late, since manifests are also read before torch is loaded

    return isinstance(getattr(torch, name, None), torch.dtype)


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
