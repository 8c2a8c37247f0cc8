"""Convert HuggingFace safetensors to a Megatron torch_dist checkpoint and back, tensor by tensor.

Neither direction builds a model or needs a process group. Memory holds one tensor at a time on the way to Megatron, and
one output shard at a time on the way to HuggingFace.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from tqdm import tqdm

from tgdpo_megatron.checkpoint.failures import readable, writable
from tgdpo_megatron.checkpoint.fingerprint import combine, tensor_sum
from tgdpo_megatron.checkpoint.manifest import (
    HF,
    WEIGHTS,
    CheckpointManifest,
    copy_companions,
    describe,
    read_manifest,
    read_metadata,
    write_manifest,
)
from tgdpo_megatron.checkpoint.safetensors import HfWeights, write_shards
from tgdpo_megatron.data.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.families import family_of, read_description
from tgdpo_megatron.model.tensor_maps import TensorMap

CONTENT_METADATA = {"non_homogeneous_layers": True}
"""Tells Megatron that every layer has keys of its own, and that layers are not stacked under one key."""

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def hf_to_megatron(source: Path, target: Path, *, dtype: str | None = None) -> CheckpointManifest:
    """Convert a HuggingFace folder to a Megatron checkpoint loadable at any tensor × pipeline layout.

    Args:
        source: Folder with config.json and safetensors. A tokenizer in the folder is copied too.
        target: Folder to make. It must not exist, or be empty.
        dtype: `bf16` or `fp32`; default: as stored.

    Raises:
        UserError: An unsupported model, missing or truncated weights, weights of the wrong shape, a weight that is not
            finite, or a target in use. Nothing unfinished is left behind.
    """
    description = read_description(source)
    tensors = family_of(description).tensors(description)
    weights = HfWeights(source)
    _check_tensors(tensors, weights, source)
    dtypes = {tensor.key: _DTYPES[dtype] if dtype else _common_dtype(tensor, weights) for tensor in tensors}
    tokenizer = load_tokenizer(source) if (source / "tokenizer.json").is_file() else None
    if tokenizer is not None and len(tokenizer) > description.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only "
            f"{description.vocab_size}; use the tokenizer that belongs to the model."
        )
    work = _begin(target)
    try:
        sums = _save_weights(tensors, weights, dtypes, work / WEIGHTS, source)
        copy_companions(source, work / HF)
        manifest = CheckpointManifest(
            weights=combine(sums[torch.float32], description),
            weights_bf16=combine(sums[torch.bfloat16], description),
            dtype=str(dtypes[tensors[0].key]).removeprefix("torch."),
            tokenizer=tokenizer_hash(tokenizer) if tokenizer else None,
            template=template_hash(tokenizer) if tokenizer else None,
        )
        write_manifest(work, manifest)
        _finish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def megatron_to_hf(source: Path, target: Path, *, dtype: str | None = None) -> None:
    """Convert a Megatron checkpoint (converted, or saved by a run) to a HuggingFace folder.

    Args:
        source: Checkpoint folder.
        target: Folder to make. It must not exist, or be empty.
        dtype: `bf16` or `fp32`; default: as stored.

    Raises:
        UserError: Not a checkpoint, unreadable weights, a weight that is not finite, or a target in use.
    """
    manifest = read_manifest(source)
    description = describe(source)
    tensors = family_of(description).tensors(description)
    wanted = _DTYPES[dtype] if dtype else None
    stored = read_metadata(source / WEIGHTS).state_dict_metadata
    if lacking := next((tensor.key for tensor in tensors if tensor.key not in stored), None):
        raise UserError(f"{source}: the checkpoint lacks {lacking}.")
    work = _begin(target)
    try:
        work.mkdir()
        sizes = [
            (name, int(torch.Size(shape).numel()) * (wanted or stored[tensor.key].properties.dtype).itemsize)
            for tensor in tensors
            for name, shape in zip(tensor.names, tensor.shapes, strict=True)
        ]
        write_shards(work, sizes, _hf_tensors(tensors, stored, source, wanted))
        copy_companions(source / HF, work)
        _set_dtype(work / "config.json", wanted or getattr(torch, manifest.dtype))
        _finish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_tensors(tensors: list[TensorMap], weights: HfWeights, source: Path) -> None:
    """Refuse weights that are not exactly those of the model that config.json describes."""
    for tensor in tensors:
        for name, shape in zip(tensor.names, tensor.shapes, strict=True):
            if (found := weights.shape(name)) != shape:
                raise UserError(f"{source}: {name} has shape {found}, but config.json describes {shape}.")
            weights.dtype(name)
    known = {name for tensor in tensors for name in tensor.names} | {"lm_head.weight"}  # may be stored even if tied
    extra = [name for name in weights.shard_of if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(
            f"{source}: {extra[0]} does not belong to the model that config.json describes ({len(extra)} such tensors)."
        )


def _common_dtype(tensor: TensorMap, weights: HfWeights) -> torch.dtype:
    """The dtype that holds all parts of a tensor exactly."""
    common = weights.dtype(tensor.names[0])
    for name in tensor.names[1:]:
        common = torch.promote_types(common, weights.dtype(name))
    return common


class _OnDemand(DefaultSavePlanner):
    """A save planner that reads each tensor only when it is about to be written."""

    def __init__(self, read: Any) -> None:
        super().__init__(flatten_state_dict=False)
        self.read = read

    def resolve_data(self, write_item: Any) -> Tensor:
        tensor: Tensor = self.read(write_item.index.fqn)
        return tensor


def _save_weights(
    tensors: list[TensorMap], weights: HfWeights, dtypes: dict[str, torch.dtype], folder: Path, source: Path
) -> dict[torch.dtype, dict[str, int]]:
    """Write all tensors and return their fingerprint sums, as stored and rounded to bf16."""
    by_key = {tensor.key: tensor for tensor in tensors}
    sums: dict[torch.dtype, dict[str, int]] = {torch.float32: {}, torch.bfloat16: {}}
    progress = tqdm(total=len(tensors), desc="converting", unit="tensor", disable=len(tensors) < 50)

    def read(key: str) -> Tensor:
        tensor = by_key[key]
        whole = tensor.join([weights.read(name) for name in tensor.names]).to(dtypes[key]).contiguous()
        if not torch.isfinite(whole).all():
            raise UserError(f"{source}: {' or '.join(tensor.names)} holds numbers that are not finite.")
        for rounded_to, of_tensor in sums.items():
            start = [0] * len(tensor.shape)
            of_tensor[key] = tensor_sum(whole, shape=tensor.shape, offset=start, rounded_to=rounded_to)
        progress.update()
        return whole

    placeholders = {
        tensor.key: torch.empty(tensor.shape, dtype=dtypes[tensor.key], device="meta") for tensor in tensors
    }
    folder.mkdir(parents=True)
    with writable(f"{folder}: the checkpoint"):
        dcp.save(placeholders, storage_writer=dcp.FileSystemWriter(folder), planner=_OnDemand(read), no_dist=True)
        torch.save({"content_metadata": CONTENT_METADATA}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    progress.close()
    return sums


def _hf_tensors(
    tensors: list[TensorMap], stored: dict[str, Any], source: Path, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    reader = dcp.FileSystemReader(source / WEIGHTS)
    for tensor in tqdm(tensors, desc="converting", unit="tensor", disable=len(tensors) < 50):
        found = stored[tensor.key]
        # A checkpoint of a run holds the padded vocabulary, which has more rows than the model.
        whole = {tensor.key: torch.empty(found.size, dtype=found.properties.dtype)}
        with readable(f"{source}: {tensor.key}"):
            dcp.load(whole, storage_reader=reader, no_dist=True)
        value = whole[tensor.key][: tensor.shape[0]]
        if not torch.isfinite(value).all():
            raise UserError(
                f"{source}: {tensor.key} holds numbers that are not finite; the checkpoint is not exported."
            )
        for name, part in zip(tensor.names, tensor.part(value), strict=True):
            yield name, part.to(dtype or part.dtype).contiguous().clone()


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2))


def _begin(target: Path) -> Path:
    """Check the target, and return the path of a working folder beside it that becomes the target when it is whole."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already there and not empty; choose another folder.")
    work = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        probe = target.parent / f".{work.name}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}).") from None
    return work


def _finish(work: Path, target: Path) -> None:
    if target.exists():
        target.rmdir()
    work.rename(target)
