"""Which program saved a checkpoint, and where its weights, its settings and its tokenizer lie.

Megatron-Bridge  FOLDER/iter_0000100/: the weights, run_config.yaml and, of a training, tokenizer/
Megatron-LM      FOLDER/iter_0000100/ or FOLDER/release/: the weights, with the settings in common.pt
NeMo 2           FOLDER/weights/: the weights; FOLDER/context/: model.yaml and the tokenizer's folder

The first two name the newest of several in FOLDER/latest_checkpointed_iteration.txt. Where that file is missing, the
newest whole one is taken. Nothing here imports torch.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

from tgdpo_megatron.bounded import read_json, read_text
from tgdpo_megatron.errors import UserError

BRIDGE, NEMO, LM = "Megatron-Bridge", "NeMo 2", "Megatron-LM"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What stands for a number of steps in the tracker, and names the folder, where a checkpoint is of no training."""

_OF_NEMO_1 = (
    "is a checkpoint of NeMo 1, which is not read; make one of NeMo 2 of it first, with "
    "scripts/checkpoint_converters/convert_nemo1_to_nemo2.py of NeMo 2, or load it there and export it to HuggingFace."
)


@dataclass(frozen=True)
class Foreign:
    """A checkpoint that another program saved.

    Attributes:
        given: The folder that the user named.
        program: BRIDGE, NEMO or LM.
        weights: The folder of the .distcp files.
        settings: The file that holds the model's settings.
        tokenizer: A folder with a tokenizer.json; None where the checkpoint has none.
        cut_short: A newer checkpoint beside it that is not whole; None where there is none.
    """

    given: Path
    program: str
    weights: Path
    settings: Path
    tokenizer: Path | None
    cut_short: Path | None = None


def find_foreign(given: Path) -> Foreign | None:
    """The checkpoint of another program that lies in a folder; None where there is no sign of one.

    Raises:
        UserError: A checkpoint of NeMo 1, one in a form that is not read, or a part of one.
    """
    if _is_of_nemo_1(given):
        raise UserError(f"{given}: {_OF_NEMO_1}")
    if not given.is_dir():
        return None
    if _has_weights(given / "weights") and not (given / "hf").is_dir():  # which ours has, and an unfinished one of ours
        folder = given / "weights"
        _check_form(folder)
        model, tokenizers = given / "context" / "model.yaml", sorted(given.glob("context/*/tokenizer.json"))
        return Foreign(given, NEMO, folder, model, tokenizers[0].parent if len(tokenizers) == 1 else None)
    if given.name == "weights" and (given.parent / "context").is_dir() and _has_weights(given):
        raise UserError(f"{given}: these are the weights of a checkpoint of {NEMO}; give its folder, {given.parent}.")
    folder, cut_short = _newest(given)
    if not _has_weights(folder):
        return None
    _check_form(folder)
    tokenizer = folder / "tokenizer" if (folder / "tokenizer" / "tokenizer.json").is_file() else None
    if (folder / "run_config.yaml").is_file():
        return Foreign(given, BRIDGE, folder, folder / "run_config.yaml", tokenizer, cut_short)
    return Foreign(given, LM, folder, folder / "common.pt", tokenizer, cut_short)


def _is_of_nemo_1(given: Path) -> bool:
    """Whether this is NeMo 1's archive, or what it unpacks to."""
    if given.is_file():
        return given.suffix == ".nemo" or tarfile.is_tarfile(given)
    return (given / "model_weights").is_dir() or (given.name == "model_weights" and _has_weights(given))


def _newest(given: Path) -> tuple[Path, Path | None]:
    """The folder of the newest of several checkpoints, where the given one holds several; else the given one.

    Without the file that names it: the newest whole one, and the newest of all where that is cut short. Where none is
    whole, the newest of all.

    Raises:
        UserError: The newest is not there.
    """
    if _has_weights(given):
        return given, None
    if (given / TRACKER).is_file():
        said = read_text(given / TRACKER, what="file that names a checkpoint", limit=1000).strip()
        name = f"iter_{int(said):07d}" if said.isascii() and said.isdigit() else said
        if name != RELEASE and not name.startswith("iter_"):
            raise UserError(f"{given / TRACKER}: holds neither a number of steps nor '{RELEASE}'.")
        if not (given / name).is_dir():
            raise UserError(f"{given / TRACKER}: names {name}, which is not there; give the folder of another one.")
        return given / name, None
    found = sorted(given.glob("iter_*"), key=lambda path: path.name)
    whole = [folder for folder in found if not _is_cut_short(folder)]
    if whole and whole[-1] != found[-1]:
        return whole[-1], found[-1]
    return found[-1] if found else given, None


def _has_weights(folder: Path) -> bool:
    """Whether a folder is one that weights were saved to, in whichever of Megatron's forms."""
    return (
        any((folder / name).is_file() for name in (".metadata", "metadata.json", "run_config.yaml"))
        or next(folder.glob("mp_rank_*/"), None) is not None
    )


def _is_cut_short(folder: Path) -> bool:
    """Whether a save was interrupted here: Megatron-Core writes the two files last. The form of pickles has neither."""
    written_last = all((folder / name).is_file() for name in (".metadata", "metadata.json"))
    return not written_last and next(folder.glob("mp_rank_*/"), None) is None


def _check_form(folder: Path) -> None:
    """Refuse weights in another form than torch_dist.

    Raises:
        UserError: Megatron's older forms, PyTorch's own, or a checkpoint that is not whole.
    """
    again = "load it with the program that saved it, and save it with the checkpoint format torch_dist."
    if next(folder.glob("mp_rank_*/"), None) is not None:
        raise UserError(f"{folder}: holds a file of pickles for each rank, which is not read; {again}")
    path = folder / "metadata.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no metadata.json there, so the checkpoint is not whole, or in the form fsdp_dtensor or "
            f"torch_dcp, which is not read; {again}"
        )
    form = read_json(path, what="description of a checkpoint", limit=10_000)
    backend = form.get("sharded_backend") if isinstance(form, dict) else None
    if backend == "zarr":
        raise UserError(f"{folder}: is in the form zarr, which Megatron-Core reads no longer, nor is it here; {again}")
    if backend != "torch_dist":
        raise UserError(f"{path}: does not say that the checkpoint is in the form torch_dist; {again}")
    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder}: no .metadata there, so the checkpoint is not whole; copy it again.")
