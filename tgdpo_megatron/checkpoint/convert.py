"""Convert HuggingFace safetensors to a Megatron torch_dist checkpoint and back, some rows at a time.

Neither direction builds a model or needs a process group; only the comparison for the certificate does. Memory holds a
block of rows, on the way to Megatron and of a checkpoint that was converted; one tensor of a checkpoint that a run
saved. Several processes can share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tgdpo_megatron import __version__
from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.checkpoint.certify import certify
from tgdpo_megatron.checkpoint.failures import writable
from tgdpo_megatron.checkpoint.fingerprint import combine
from tgdpo_megatron.checkpoint.index import Index, StoredTensor, read_index
from tgdpo_megatron.checkpoint.jobs import Part, Sums, ToHuggingFace, ToMegatron, in_parts
from tgdpo_megatron.checkpoint.manifest import (
    FORMAT,
    HF,
    WEIGHTS,
    CheckpointManifest,
    companions,
    copy_companions,
    read_manifest,
    write_manifest,
)
from tgdpo_megatron.checkpoint.safetensors import HfShards, HfTensor, HfWeights
from tgdpo_megatron.checkpoint.torch_dist import StoredBox, stored_boxes, write_index_of_boxes
from tgdpo_megatron.checkpoint.work import Work, check_target, work_on
from tgdpo_megatron.data.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import family_of, read_description
from tgdpo_megatron.model.families.decoder import VOCABULARY
from tgdpo_megatron.model.tensor_maps import TensorMap

BLOCK_BYTES = 30 * 1000**2
"""Bytes of the rows that are read, joined and written at once. Malloc keeps blocks below 32 MiB, so that the next one
gets memory that is there already."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def hf_to_megatron(
    source: Path, target: Path, *, dtype: str | None = None, processes: int = 1, certificate: bool = True
) -> CheckpointManifest:
    """Convert a HuggingFace folder to a Megatron checkpoint loadable at any tensor × pipeline layout, and certify it.

    Args:
        source: Folder with config.json and safetensors. A tokenizer in the folder is copied too.
        target: Folder to make. It must not exist, or be empty.
        dtype: `bf16` or `fp32`; default: each tensor as stored.
        processes: How many share the work.
        certificate: Whether both models then score the same tokens, which programs ask for.

    Raises:
        UserError: An unsupported model, missing or truncated weights, weights of the wrong shape, a weight that is not
            finite, a target in use, no space for it, or log-probs that are not HuggingFace's. Nothing that looks whole
            is left behind. What is finished stays in TARGET.partial only where the same call can go on from it: after
            a full disk or a killed process.
    """
    check_target(target)
    planned = plan(source, dtype)
    tokenizer = planned.tokenizer
    with work_on(target, planned.identity) as work:
        stored, sums = planned.write(work, work.folder / WEIGHTS, processes)
        with writable(f"{work.folder}: the checkpoint"):
            write_index_of_boxes(work.folder / WEIGHTS, stored, {})
            copy_companions(source, work.folder / HF)
            manifest = CheckpointManifest(
                weights=combine(sums.exact, planned.description),
                weights_bf16=combine(sums.bf16, planned.description),
                dtype=str(next(iter(planned.dtypes.values()))).removeprefix("torch."),
                tokenizer=tokenizer_hash(tokenizer) if tokenizer else None,
                template=template_hash(tokenizer) if tokenizer else None,
            )
            write_manifest(work.folder, manifest)
        if certificate:
            certify(source, work.folder)
        work.finish()
    return manifest


@dataclass(frozen=True)
class Planned:
    """A HuggingFace folder that is to be written in Megatron's form.

    Attributes:
        dtypes: Of the Megatron tensors, by key.
        shapes: Of the Megatron tensors, by key.
        parts: The blocks that are written, in parts.
        tokenizer: The folder's; None where it has none.
        identity: Everything that the result depends on.
    """

    description: ModelDescription
    weights: HfWeights
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    parts: list[Part]
    tokenizer: Any
    identity: dict[str, Any]

    def write(
        self, work: Work, folder: Path, processes: int, layers: int | None = None
    ) -> tuple[list[StoredBox], Sums]:
        """Write all .distcp files to a folder; returns where everything lies in them, and its sums.

        Args:
            processes: How many share the work.
            layers: As for torch_dist.box_of.
        """
        with writable(f"{folder}: the checkpoint"):
            folder.mkdir(exist_ok=True)
        job = ToMegatron(self.parts, self.dtypes, self.shapes, self.weights, folder, layers)
        records = work.do(job, [_bytes(part, self.dtypes) for part in self.parts], processes)
        blocks = [block for part in self.parts for block in part]
        written = [tuple(found) for one in records for found in one["stored"]]
        return stored_boxes(blocks, self.dtypes, self.shapes, written, layers), Sums.of(records)


def plan(source: Path, dtype: str | None) -> Planned:
    """What is to be written of a HuggingFace folder.

    Raises:
        UserError: An unsupported model, or weights or a tokenizer that are not those of the model.
    """
    description = read_description(source)
    tensors = family_of(description).tensors(description)
    weights = HfWeights(source)
    _check_tensors(tensors, weights, source)
    tokenizer = load_tokenizer(source) if (source / "tokenizer.json").is_file() else None
    if tokenizer is not None and len(tokenizer) > description.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only "
            f"{description.vocab_size}; use the tokenizer that belongs to the model."
        )
    dtypes = {tensor.key: _DTYPES[dtype] if dtype else _common_dtype(tensor, weights) for tensor in tensors}
    parts = in_parts(
        block for tensor in tensors for block in tensor.blocks(_rows_of_a_block(tensor.shape, dtypes[tensor.key]))
    )
    shapes = {tensor.key: tensor.shape for tensor in tensors}
    identity = _identity(parts, dtypes, source, weights.files)
    return Planned(description, weights, dtypes, shapes, parts, tokenizer, identity)


def megatron_to_hf(source: Path, target: Path, *, dtype: str | None = None, processes: int = 1) -> None:
    """Convert a Megatron checkpoint (converted, or saved by a run) to a HuggingFace folder.

    Args:
        source: Checkpoint folder.
        target: Folder to make. It must not exist, or be empty.
        dtype: `bf16` or `fp32`; default: each tensor as stored.
        processes: How many share the work.

    Raises:
        UserError: Not a checkpoint, unreadable or altered weights, a weight that is not finite, a target in use, or no
            space for it. What is left behind: as in hf_to_megatron.
    """
    check_target(target)
    manifest, weights = read_manifest(source), source / WEIGHTS
    export(Stored(source, weights, read_index(weights), source / HF, manifest.weights), target, dtype, processes)


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is exported.

    Attributes:
        source: Its folder, as it is named in sentences.
        weights: The folder of its .distcp files.
        index: Its tensors, by this project's keys. There may be more than those of the model.
        hf: The folder with config.json and the tokenizer.
        fingerprint: That its weights must have; None where nothing says so.
    """

    source: Path
    weights: Path
    index: Index
    hf: Path
    fingerprint: str | None = None


def export(stored: Stored, target: Path, dtype: str | None, processes: int) -> None:
    """Write a checkpoint as a HuggingFace folder.

    Args, Raises: As megatron_to_hf.
    """
    source, index, description = stored.source, stored.index, read_description(stored.hf)
    tensors = family_of(description).tensors(description)
    _check_stored(tensors, index, source)
    dtypes = {tensor.key: _DTYPES[dtype] if dtype else getattr(torch, index[tensor.key].dtype) for tensor in tensors}
    # Blocks that are no larger than a tensor's stored ones are each read once; of larger ones the tensor is read whole.
    parts = in_parts(block for tensor in tensors for block in tensor.blocks(_rows_to_read(tensor, index[tensor.key])))
    shards = HfShards(
        [
            HfTensor(name, shape, dtypes[tensor.key])
            for tensor in tensors
            for name, shape in zip(tensor.names, tensor.shapes, strict=True)
        ]
    )
    files = sorted(path for path in (source / "manifest.json", *stored.weights.iterdir()) if path.is_file())
    with work_on(target, _identity(parts, dtypes, stored.hf, files)) as work:
        job = ToHuggingFace(parts, index, shards, source, stored.weights, work.folder)
        with writable(f"{work.folder}: the model"):
            shards.begin(work.folder)
        records = work.do(job, [_bytes(part, dtypes) for part in parts], processes)
        if stored.fingerprint not in (None, combine(Sums.of(records).exact, description)):
            raise UserError(f"{source}: the weights are not those that the manifest names; the checkpoint was altered.")
        with writable(f"{work.folder}: the model"):
            shards.finish(work.folder)
            copy_companions(stored.hf, work.folder)
            _complete_config(work.folder / "config.json", dtypes[tensors[0].key], family_of(description).architecture)
        work.finish()


def _check_tensors(tensors: list[TensorMap], weights: HfWeights, source: Path) -> None:
    """Refuse weights that are not exactly those of the model that config.json describes."""
    known = [name for tensor in tensors for name in tensor.names]
    stored = set(weights.names)
    if lacking := [name for name in known if name not in stored]:
        raise UserError(f"{source}: the weights lack the tensor {_first_of(lacking)}.")
    for tensor in tensors:
        for name, shape in zip(tensor.names, tensor.shapes, strict=True):
            if (found := weights.shape(name)) != shape:
                raise UserError(f"{source}: {name} has shape {found}, but config.json describes {shape}.")
            weights.dtype(name)
    allowed = set(known)
    if "lm_head.weight" in stored - allowed:  # a tied model may store it as well
        _check_tied(weights, source)
        allowed.add("lm_head.weight")
    extra = [name for name in weights.names if name not in allowed and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(f"{source}: {_first_of(extra)} does not belong to the model that config.json describes.")


def _check_tied(weights: HfWeights, source: Path) -> None:
    """Refuse an output matrix that is not the embedding, although config.json ties the two."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    rows, *columns = weights.shape(embedding)
    step = _rows_of_a_block((rows, *columns), weights.dtype(embedding))
    same = weights.shape(head) == (rows, *columns)
    for first in range(0, rows if same else 0, step):
        count = min(step, rows - first)
        same = same and torch.equal(weights.rows(head, first, count), weights.rows(embedding, first, count))
    if not same:
        raise UserError(
            f"{source}: {head} is not {embedding}, although config.json ties them (tie_word_embeddings); set it to "
            f"false there, or leave {head} out of the weights."
        )


def _check_stored(tensors: list[TensorMap], index: Index, source: Path) -> None:
    """Refuse a checkpoint that does not hold the model that its config.json describes.

    It may hold more: the optimizer's state, and rows of padding after the vocabulary.
    """
    if lacking := [tensor.key for tensor in tensors if tensor.key not in index]:
        raise UserError(f"{source}: the checkpoint lacks {_first_of(lacking)}.")
    for tensor in tensors:
        found = index[tensor.key].shape
        padded = tensor.key in VOCABULARY and found[0] > tensor.shape[0] and found[1:] == tensor.shape[1:]
        if found != tensor.shape and not padded:
            raise UserError(f"{source}: {tensor.key} has shape {found}, but config.json describes {tensor.shape}.")
        if (dtype := index[tensor.key].dtype) not in ("bfloat16", "float16", "float32"):
            raise UserError(f"{source}: {tensor.key} holds {dtype} numbers, which no weight is stored as.")


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, and {len(names) - 1} more"


def _common_dtype(tensor: TensorMap, weights: HfWeights) -> torch.dtype:
    """The dtype that holds all parts of a tensor exactly."""
    common = weights.dtype(tensor.names[0])
    for name in tensor.names[1:]:
        common = torch.promote_types(common, weights.dtype(name))
    return common


def _rows_of_a_block(shape: Sequence[int], dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (torch.Size(shape[1:]).numel() * dtype.itemsize))


def _rows_to_read(tensor: TensorMap, stored: StoredTensor) -> int:
    rows = _rows_of_a_block(tensor.shape, getattr(torch, stored.dtype))
    whole_rows = all(block.shape[1:] == stored.shape[1:] and block.shape[0] <= rows for block in stored.blocks)
    return rows if whole_rows else tensor.shape[0]


def _bytes(part: Part, dtypes: dict[str, torch.dtype]) -> int:
    """What a part writes."""
    return sum(torch.Size(block.tensor.shape).numel() * dtypes[block.tensor.key].itemsize for block in part)


def _identity(
    parts: Sequence[Part], dtypes: dict[str, torch.dtype], config: Path, files: Iterable[Path]
) -> dict[str, Any]:
    """Everything that a conversion's result depends on. Files count as the same by their name, size and time."""
    others = [config / name for name in companions(config)]
    text = json.dumps([repr(parts), {key: str(dtype) for key, dtype in dtypes.items()}])
    return {
        "program": [__version__, FORMAT],
        "parts": hashlib.sha256(text.encode()).hexdigest(),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in (*others, *files)],
    }


def _complete_config(path: Path, dtype: torch.dtype, architecture: str) -> None:
    """Say the dtype in config.json, under the old name too where the model came with it, and the architecture."""
    config = read_json(path, what="config.json")
    name = str(dtype).removeprefix("torch.")
    config |= {"dtype": name} | ({"torch_dtype": name} if "torch_dtype" in config else {})
    config.setdefault("architectures", [architecture])
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
