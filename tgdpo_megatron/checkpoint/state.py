"""Save and load what Megatron trains: weights at any parallel layout, and the state that a run continues from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch import Tensor

from tgdpo_megatron.cache import mended_by_deletion
from tgdpo_megatron.checkpoint.certificate import hand_on
from tgdpo_megatron.checkpoint.failures import readable
from tgdpo_megatron.checkpoint.fingerprint import model_fingerprint
from tgdpo_megatron.checkpoint.index import Index, read_index
from tgdpo_megatron.checkpoint.manifest import (
    HF,
    SETTINGS,
    WEIGHTS,
    CheckpointManifest,
    copy_companions,
    read_manifest,
)
from tgdpo_megatron.checkpoint.reading import read_into, read_plain
from tgdpo_megatron.checkpoint.saving import Save
from tgdpo_megatron.checkpoint.shards import model_shards, optimizer_shards
from tgdpo_megatron.checkpoint.sums import SUMS
from tgdpo_megatron.checkpoint.torch_dist import CONTENT_METADATA
from tgdpo_megatron.errors import NonFiniteError, UserError, in_short
from tgdpo_megatron.model.gpt import PreferenceGPT
from tgdpo_megatron.platform.processes import RANK_TIMEOUT_MINUTES


def load_weights(chunks: Sequence[PreferenceGPT], folder: Path) -> None:
    """Load a checkpoint's weights into a built model, and check them against the manifest. Collective.

    Raises:
        UserError: Unreadable or altered weights, or a weight that is not finite.
    """
    with mended_by_deletion(folder):
        manifest = read_manifest(folder, with_index=False)
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
    patience: float = 60 * RANK_TIMEOUT_MINUTES,
) -> Save:
    """Begin to write weights and optimizer state. Collective.

    Args:
        optimizer: Its state is left out where the manifest says `weights_only`.
        companions: Checkpoint folder whose hf/ files describe this model.
        manifest: The checkpoint's identity. Its fingerprints are filled in here.
        template: Text of a chat template that takes the place of the tokenizer's own.
        settings: Text of the run's config.yaml.
        background: Whether to copy the state, and write the copy while this rank goes on. Otherwise the state must
            stay as it is until the save is finished.
        patience: Seconds that a rank may take without writing anything.

    Raises:
        NonFiniteError: A weight is not finite. Nothing is written then.
        NotWrittenError: The operating system refuses the folder.
    """
    try:
        weights = fingerprint(chunks)
        rounded = weights if chunks[0].config.bf16 else fingerprint(chunks, rounded_to=torch.bfloat16)
    except UserError as error:
        raise NonFiniteError(f"{folder}: {error}; the checkpoint was not saved.") from None
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

    return Save(
        folder,
        shards,
        common,
        manifest,
        add_files=add_files,
        background=background,
        patience=patience,
        device=next(chunks[0].parameters()).device,
    )


def load_training_state(folder: Path, chunks: Sequence[PreferenceGPT], optimizer: Any, scheduler: Any) -> None:
    """Load weights, optimizer and schedule from a checkpoint that a run saved. Collective.

    The settings of the optimizer stay those that it was built with.
    """
    model_state = sharded_model_state(chunks)
    options = [{name: group[name] for name in _SET_BY_USERS if name in group} for group in optimizer.param_groups]
    optimizer_state = optimizer.sharded_state_dict(
        _for_optimizer(model_state), is_loading=True, metadata=megatron_layout()
    )
    loaded = _read({"model": model_state, "optimizer": optimizer_state, "scheduler": scheduler.state_dict()}, folder)
    _put(chunks, loaded["model"])
    with _fitting(folder):
        optimizer.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
    for group, chosen in zip(optimizer.param_groups, options, strict=True):
        group.update(chosen)
    _check_fingerprint(chunks, read_manifest(folder, with_index=False), folder)


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
    """Fill a sharded state from a checkpoint's tensors, and add its plain data. Collective.

    Megatron's own loading unpickles. Here a checkpoint is read as numbers, and Megatron puts them in their places.

    Raises:
        UserError: On every rank, where any of them cannot read its part.
    """
    error: UserError | None = None
    try:
        with readable(f"{folder}: the checkpoint"):
            loaded = _fill(state, folder / WEIGHTS)
    except UserError as caught:
        error = caught
    errors: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next(filter(None, (error, *errors)), None):
        raise first
    return loaded


def _fill(state: dict[str, Any], weights: Path) -> dict[str, Any]:
    index, common = read_index(weights), weights / "common.pt"
    force_all_tensors_to_non_fp8(state)
    sharded, unsaved, factories = load_preprocess(state)
    sharded, plain = extract_sharded_base(sharded)
    with readable(f"{common}: this part of the checkpoint"):
        content = read_plain(common)
        _check_like(plain, content, "the state")
    content.pop("model", None)  # weights are tensors
    merge(content, unsaved)
    merge(content, dict_list_map_outplace(lambda part: _fill_part(part, weights, index), sharded))
    filled: dict[str, Any] = apply_factory_merges(content, factories)
    return filled


def _check_like(expected: Any, found: Any, where: str) -> None:
    """Refuse plain data of another kind than this run has in the same place.

    Options may be missing, and there may be others: Adam is not the same everywhere.

    Raises:
        ValueError: The data do not fit.
    """
    if isinstance(expected, _NUMBERS):
        fits = isinstance(found, _NUMBERS)
    else:
        fits = expected is None or type(found) is type(expected)
    if not fits:
        raise ValueError(f"{where} is a {type(found).__name__}, not a {type(expected).__name__}")
    if isinstance(expected, dict):
        for name, value in expected.items():
            if name in found:
                _check_like(value, found[name], f"{name!r} in {where}")
            elif isinstance(value, dict | list):
                raise ValueError(f"{where} lacks {name!r}")
    elif isinstance(expected, list | tuple):
        for value, one in zip(expected, found, strict=False):
            _check_like(value, one, f"a part of {where}")


_NUMBERS = (int, float, Tensor)


@contextlib.contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Say in a sentence that Megatron finds a state unfit, which it says by whatever its lines happen to raise."""
    try:
        yield
    except (LookupError, AssertionError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        why = f"{type(error).__name__}: {in_short(error)}"
        raise UserError(f"{folder}: the training state does not fit this run ({why}).") from error


def _fill_part(part: ShardedTensor, weights: Path, index: Index) -> Tensor:
    """Fill a rank's part of a tensor. Rows of padding, which another layout may not have stored, are set to 0."""
    assert isinstance(part, ShardedTensor), part
    if (stored := index.get(part.key)) is None:
        raise UserError(f"{weights}: the checkpoint lacks {part.key}.")
    same_axes = len(stored.shape) == len(part.global_shape)
    if stored.shape != tuple(part.global_shape) and not (part.allow_shape_mismatch and same_axes):
        raise UserError(f"{weights}: {part.key} has shape {stored.shape}, but the model's has {part.global_shape}.")
    part.init_data("cpu")
    assert part.data is not None
    target = part.data.detach().view((1,) * part.prepend_axis_num + tuple(part.local_shape))
    if stored.shape != tuple(part.global_shape):
        target.zero_()
        for axis, (first, size) in enumerate(zip(part.global_offset, stored.shape, strict=True)):
            target = target.narrow(axis, 0, min(target.shape[axis], max(0, size - first)))
    read_into(target, weights, stored, part.global_offset)
    return part.data


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
