"""Going on with a run: from which of its checkpoints, and whether it is still the same run."""

from __future__ import annotations

import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tgdpo_megatron import run_folder
from tgdpo_megatron.checkpoint.manifest import CheckpointManifest, describe, read_manifest
from tgdpo_megatron.checkpoint.saving import UNFINISHED
from tgdpo_megatron.checkpoint.sums import SUMS, first_damage
from tgdpo_megatron.config import Config, LossConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.platform.processes import Ranks, on_first_rank

_FIXED = {
    "loss": tuple(LossConfig.model_fields),
    "data": ("max_length", "shuffle", "weights"),
    "train": ("global_batch_size", "seed", "precision", "fp8", "fp8_recipe"),
    "optimizer": (
        "lr",
        "min_lr",
        "lr_decay_style",
        "lr_warmup_iters",
        "clip_grad",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
    ),
}
"""Settings that make a run what it is. Layout, micro-batches, intervals and train_iters are none of them."""
_NEVER = ("train.precision", "tokenizer")
"""What cannot change even if the user says so: the weights' meaning depends on it."""
_INPUTS = {
    "tokenizer": ("another tokenizer", ("model", "checkpoint")),
    "template": ("another chat template", ("data", "template")),
    "chat_template_kwargs": ("other data.chat_template_kwargs", ("data", "chat_template_kwargs")),
    "pairs_hash": ("other pairs", ("data", "train")),
    "reference": ("another reference", ("model", "reference")),
    "guidance": ("another guidance", ("model", "guidance")),
    "rewards": ("other contrastive prompts or another reward file", ("scores", "reward_file")),
}
"""Field of a manifest -> how a sentence calls a change of it, and the setting that says where it comes from."""


def find_start(output: Path, ranks: Ranks) -> Path | None:
    """The checkpoint from which a run goes on: its newest whole one. None where it has saved none. Collective.

    Every file is compared with its checksum, by one of the ranks. A damaged checkpoint is moved out of the way, with a
    sentence on stderr, and the one before is taken. What a killed save or removal left is deleted.

    Raises:
        UserError: There are checkpoints, but none of them is whole; or one cannot be read.
    """
    on_first_rank(ranks, partial(_delete_unfinished, output))
    moved = on_first_rank(ranks, partial(_damaged_names, output))
    while (newest := on_first_rank(ranks, partial(_newest_folder, output))) is not None:
        damage = _altered_file(newest, ranks) or on_first_rank(ranks, partial(_what_is_wrong, newest))
        if damage is None:
            return Path(newest)
        moved.append(on_first_rank(ranks, partial(_move_aside, newest, damage)))
    if moved:
        raise UserError(
            f"{output}: no whole checkpoint is left to go on from; those that are damaged are {', '.join(moved)} in "
            f"{output / run_folder.CHECKPOINTS}. Start a new run in another train.output."
        )
    return None


def _delete_unfinished(output: Path) -> None:
    for path in (output / run_folder.CHECKPOINTS).glob(f"*{UNFINISHED}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _damaged_names(output: Path) -> list[str]:
    """Names of the checkpoints that were found damaged before: a run that had some is not started anew over them."""
    return sorted(path.name for path in (output / run_folder.CHECKPOINTS).glob(f"iter-*{run_folder.DAMAGED}*"))


def _newest_folder(output: Path) -> Path | None:
    """The folder with the highest step, whole or not."""
    return max(run_folder.checkpoint_folders(output), key=run_folder.step_of, default=None)


def _altered_file(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with a file that has a checksum, in words; None where nothing is. The ranks share the files.

    Raises:
        UserError: A file is there, but cannot be read, on any rank.
    """
    damage = unread = None
    try:
        if (folder / SUMS).is_file():
            damage = first_damage(folder, part=ranks.rank, parts=ranks.world_size)
    except OSError as error:
        unread = error.strerror
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, (damage, unread))
    if reason := next(filter(None, (unread for _, unread in found)), None):
        raise UserError(f"{folder}: this checkpoint cannot be read ({reason}); it was left as it is.")
    return next(filter(None, (damage for damage, _ in found)), None)


def _what_is_wrong(folder: Path) -> str | None:
    """What is wrong with a checkpoint of whose files none was altered, in words; None where nothing is.

    Raises:
        UserError: Another version has saved it.
    """
    if not (folder / "manifest.json").is_file():
        return "manifest.json is missing"
    has_sums = (folder / SUMS).is_file()
    try:
        manifest = read_manifest(folder, with_index=not has_sums)  # an index with a checksum is as it was saved
    except UserError as error:
        if has_sums:
            raise
        return re.sub(rf"^{re.escape(str(folder))}[/:]*\s*", "", str(error)).removesuffix(".")
    if manifest.sums is not None and not has_sums:
        return f"{manifest.sums} is missing"
    if manifest.iteration != run_folder.step_of(folder):
        return f"its manifest is of step {manifest.iteration}"
    return None


def _move_aside(folder: Path, damage: str) -> str:
    """Rename a damaged checkpoint, and say so. Returns its new name."""
    target = folder.with_name(folder.name + run_folder.DAMAGED)
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}{run_folder.DAMAGED}-{number}")
    folder.rename(target)
    print(
        f"warning: {folder} is damaged ({damage}); it is now called {target.name}, and an earlier one is looked for.",
        file=sys.stderr,
        flush=True,
    )
    return target.name


def is_finished(start: Path | None, config: Config) -> bool:
    """Whether a run has done all its steps by the checkpoint from which it would go on."""
    return start is not None and run_folder.step_of(start) >= (config.train.train_iters or 0)


def check_continues(
    start: Path | None, config: Config, identity: CheckpointManifest, description: ModelDescription | None = None
) -> list[str]:
    """Refuse to go on with a run as another one.

    Args:
        start: The checkpoint to go on from; None for a new run.
        identity: What the checkpoints of the run would now say of it.
        description: The shape of the model that is to be trained.

    Returns:
        What has changed, in words, where train.resume_with_changes accepts it.

    Raises:
        UserError: Something has changed; or the run is to go on, and has kept no optimizer state.
    """
    if start is None:
        return []
    before = read_manifest(start, with_index=False)
    if before.weights_only and not is_finished(start, config):
        whole = [folder for folder in run_folder.whole_checkpoints(start.parent.parent) if _has_optimizer(folder)]
        earlier = f", or remove what is newer than {whole[-1].name}, which has the optimizer's state" if whole else ""
        raise UserError(
            f"{start}: holds weights alone (train.save_optimizer=false), so the run cannot go on; start a new run with "
            f"model.checkpoint={start}{earlier}."
        )
    if description is not None and (differs := description.differs_from(describe(start))):
        raise UserError(f"{start}: the run has a model of another shape ({', '.join(differs)}); start a new run.")
    saved, current = run_folder.kept_settings(start), config.model_dump(mode="json")
    changes = {}
    for name, (words, (group, setting)) in _INPUTS.items():
        was, now = getattr(before, name), getattr(identity, name)
        if was != now and not (name == "chat_template_kwargs" and was is None):  # of an earlier version
            changes[name] = f"the run had {words} than now{_named(saved, current, group, setting)}"
    for group, names in _FIXED.items():
        for name in names:
            was, now = saved.get(group, {}).get(name), current[group][name]
            if was != now:
                changes[f"{group}.{name}"] = f"the run has {group}.{name}={was}, not {now}"
    refused = {name for name in changes if name in _NEVER or not config.train.resume_with_changes}
    if refused:
        all_the_same = "" if refused & set(_NEVER) else ", or go on all the same with train.resume_with_changes=true"
        said = "; ".join(changes[name] for name in changes if name in refused)
        raise UserError(f"{start}: {said}; continue it as it was, start a new run{all_the_same}.")
    return list(changes.values())


def _has_optimizer(checkpoint: Path) -> bool:
    try:
        return not read_manifest(checkpoint, with_index=False).weights_only
    except UserError:
        return False


def _named(saved: dict[str, dict[str, Any]], current: dict[str, Any], group: str, setting: str) -> str:
    """Where an input came from, and where it comes from now, if these are different places."""
    was, now = saved.get(group, {}).get(setting), current[group][setting]
    return f" ({group}.{setting} was {was}, and is {now})" if was != now else ""


def warmup_of(start: Path) -> int | None:
    """The steps of warm-up of the run that a checkpoint belongs to."""
    steps = run_folder.kept_settings(start).get("optimizer", {}).get("lr_warmup_iters")
    return steps if isinstance(steps, int) else None
