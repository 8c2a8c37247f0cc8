"""Save and load what Megatron trains: weights at any parallel layout, and the state that a run continues from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state

from tgdpo_megatron.cache import mended_by_deletion
from tgdpo_megatron.checkpoint.certificate import hand_on
from tgdpo_megatron.checkpoint.failures import readable
from tgdpo_megatron.checkpoint.fingerprint import model_fingerprint
from tgdpo_megatron.checkpoint.manifest import (
    HF,
    SETTINGS,
    WEIGHTS,
    CheckpointManifest,
    copy_companions,
    read_manifest,
)
from tgdpo_megatron.checkpoint.saving import Save
from tgdpo_megatron.checkpoint.shards import model_shards, optimizer_shards
from tgdpo_megatron.checkpoint.sums import SUMS
from tgdpo_megatron.checkpoint.torch_dist import CONTENT_METADATA
from tgdpo_megatron.errors import NonFiniteError, UserError, in_short
from tgdpo_megatron.model.gpt import PreferenceGPT


def load_weights(chunks: Sequence[PreferenceGPT], folder: Path) -> None:
    """Load a checkpoint's weights into a built model, and check them against the manifest. Collective.

    Raises:
        UserError: Unreadable or altered weights, or a weight that is not finite.
    """
    with mended_by_deletion(folder):
        manifest = read_manifest(folder)
        state = sharded_model_state(chunks)
        _put(chunks, _read({"model": state}, folder)["model"])
        _check_fingerprint(chunks, manifest, folder)


def _check_fingerprint(chunks: Sequence[PreferenceGPT], manifest: CheckpointManifest, folder: Path) -> None:
    try:
        found = fingerprint(chunks)
    except UserError as error:
        raise UserError(f"{folder}: {error}; use another checkpoint.") from None
    if found != (manifest.weights_bf16 if chunks[0].config.bf16 else manifest.weights):
        raise UserError(f"{folder}: the weights are not those that the manifest names; the checkpoint was altered.")


def fingerprint(chunks: Sequence[PreferenceGPT], rounded_to: torch.dtype = torch.float32) -> str:
    """Fingerprint of a model in memory. It is the same at every parallel layout. Collective over all ranks."""
    return model_fingerprint(sharded_model_state(chunks), chunks[0].description, rounded_to)


def save_checkpoint(
    folder: Path,
    chunks: Sequence[PreferenceGPT],
    optimizer: Any,
    scheduler: Any,
    *,
    companions: Path,
    manifest: CheckpointManifest,
    template: str | None = None,
) -> CheckpointManifest:
    """Write weights and optimizer state so that the folder appears whole or not at all. Collective.

    Args, Raises: As begin_save, and as Save.finish.
    """
    save = begin_save(folder, chunks, optimizer, scheduler, companions=companions, manifest=manifest, template=template)
    return save.finish()


def begin_save(
    folder: Path,
    chunks: Sequence[PreferenceGPT],
    optimizer: Any,
    scheduler: Any,
    *,
    companions: Path,
    manifest: CheckpointManifest,
    template: str | None = None,
    settings: str | None = None,
    background: bool = False,
) -> Save:
    """Begin to write weights and optimizer state. Collective.

    Args:
        optimizer: Its state is left out where the manifest says `weights_only`.
        companions: Checkpoint folder whose hf/ files describe this model.
        manifest: The checkpoint's identity. Its fingerprints are filled in here.
        template: Text of a chat template that takes the place of the tokenizer's own.
        settings: Text of the run's config.yaml.
        background: Whether to copy the state, and write the copy while this rank goes on.

    Raises:
        NonFiniteError: A weight is not finite. Nothing is written then.
        NotWrittenError: The operating system refuses the folder.
    """
    try:
        weights = fingerprint(chunks)
        rounded = weights if chunks[0].config.bf16 else fingerprint(chunks, rounded_to=torch.bfloat16)
    except UserError as error:
        raise NonFiniteError(
            f"{folder}: {error}; the checkpoint was not saved, and the one before it is kept."
        ) from None
    manifest = replace(manifest, weights=weights, weights_bf16=rounded, sums=SUMS)
    shards, common = model_shards(sharded_model_state(chunks)), {"iteration": manifest.iteration}
    if not manifest.weights_only:
        more, of_optimizer = optimizer_shards(optimizer, _for_optimizer(sharded_model_state(chunks)), megatron_layout())
        shards += more
        common |= {"optimizer": of_optimizer, "scheduler": scheduler.state_dict()}

    def add_files(work: Path) -> None:
        copy_companions(companions / HF, work / HF, template)
        hand_on(companions, work, manifest)
        if settings is not None:
            (work / SETTINGS).write_text(settings, encoding="utf-8")

    return Save(folder, shards, common, manifest, add_files=add_files, background=background)


def load_training_state(folder: Path, chunks: Sequence[PreferenceGPT], optimizer: Any, scheduler: Any) -> None:
    """Load weights, optimizer and schedule from a checkpoint that a run saved. Collective.

    The settings of the optimizer stay those that it was built with.
    """
    model_state = sharded_model_state(chunks)
    options = [{name: group[name] for name in _SET_BY_USERS if name in group} for group in optimizer.param_groups]
    optimizer_state = optimizer.sharded_state_dict(
        _for_optimizer(model_state), is_loading=True, metadata=megatron_layout()
    )
    loaded = _read({"model": model_state, "optimizer": optimizer_state}, folder)
    _put(chunks, loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for group, chosen in zip(optimizer.param_groups, options, strict=True):
        group.update(chosen)
    scheduler.load_state_dict(loaded["scheduler"])
    _check_fingerprint(chunks, read_manifest(folder), folder)


_SET_BY_USERS = ("max_lr", "min_lr", "weight_decay", "betas", "eps")
"""Options of a group of weights that a checkpoint keeps, and that the settings decide."""


def sharded_model_state(chunks: Sequence[PreferenceGPT]) -> dict[str, Any]:
    """The model's tensors, without the extra state of layers.

    Extra state depends on the implementation of the layers, and a checkpoint must not. It holds only the scales of
    delayed FP8, which a run that continues computes again.
    """
    return {
        str(place): {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=megatron_layout()).items()
            if not name.endswith("_extra_state")
        }
        for place, chunk in enumerate(chunks)
    }


def _read(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    common = folder / WEIGHTS / "common.pt"
    try:
        torch.load(common, map_location="cpu", weights_only=True)  # small; Megatron's own reading of it is less careful
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{common}: this part of the checkpoint cannot be read ({in_short(error)}).") from error
    with readable(f"{folder}: the checkpoint"):
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder / WEIGHTS))
    return loaded


def _put(chunks: Sequence[PreferenceGPT], loaded: dict[str, Any]) -> None:
    for place, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[str(place)], strict=False)
        missing = [name for name in missing if not name.endswith("_extra_state")]
        assert not missing and not unexpected, (missing, unexpected)


def _for_optimizer(model_state: dict[str, Any]) -> dict[str, Any]:
    """Megatron's optimizer takes one flat dict, or `model0`, `model1`, … for several chunks."""
    if len(model_state) == 1:
        only: dict[str, Any] = model_state["0"]
        return only
    return {f"model{place}": state for place, state in model_state.items()}


def megatron_layout() -> dict[str, Any]:
    """How Megatron lays a checkpoint out: so that it can be read at any other layout."""
    return {
        **CONTENT_METADATA,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
