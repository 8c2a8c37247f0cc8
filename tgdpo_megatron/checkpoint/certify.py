"""Compares a converted checkpoint with its HuggingFace model: both score the same tokens, in fp32 on the CPU.

Both models are built without weights, and each module has its weights only while it runs: see lending.py. Sliding
windows are narrowed on both sides, so that a few tokens show whether they are on the right layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from tgdpo_megatron.checkpoint.certificate import (
    Certificate,
    config_hash,
    limit_for,
    read_certificate,
    write_certificate,
)
from tgdpo_megatron.checkpoint.failures import InterruptedWorkError
from tgdpo_megatron.checkpoint.index import Index, read_index
from tgdpo_megatron.checkpoint.lending import lend, without_weights
from tgdpo_megatron.checkpoint.manifest import WEIGHTS, describe, read_manifest
from tgdpo_megatron.checkpoint.reading import read_rows
from tgdpo_megatron.checkpoint.safetensors import HfWeights
from tgdpo_megatron.config import Config
from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.data.prepare import PreparedPairs, Summary
from tgdpo_megatron.errors import USER_ERROR, UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import family_of, parameters, read_description
from tgdpo_megatron.platform import programs

LENGTHS = (33, 17)
"""Tokens of the two sequences that are scored, packed into one micro-batch on our side and alone on HuggingFace's."""
_WINDOW = 16
"""Tokens that windowed layers see here, where their windows are wider."""
_BLOCK = 1 << 23
"""Elements of a tensor that are read at once."""
_SLOW = 500_000_000
"""Parameters from which progress is shown."""
_PACKAGES = ("torch", "transformers", "megatron-core")


def certify(source: Path, folder: Path) -> Certificate:
    """Compare a checkpoint with the HuggingFace folder it was converted from, and write its certificate.

    The comparison runs in this process, or in a child where this one sees a GPU or is a rank of a job.

    Args:
        source: The HuggingFace folder.
        folder: The checkpoint, whole but for the certificate.

    Raises:
        UserError: The log-probs differ by more than rounding explains. No certificate is written.
    """
    if torch.cuda.is_available() or dist.is_initialized():
        return _in_child(source, folder)
    manifest, description = read_manifest(folder), describe(folder)
    if differs := read_description(source).differs_from(description):
        raise UserError(f"{folder}: was not converted from {source}, whose model differs in {', '.join(differs)}.")
    sequences = _sequences(description.vocab_size)
    index = read_index(folder / WEIGHTS)
    dtypes = {
        name: getattr(torch, index[tensor.key].dtype)
        for tensor in family_of(description).tensors(description)
        for name in tensor.names
    }
    theirs = _huggingfaces(source, dtypes, description, sequences)
    ours = _ours(folder, index, description, sequences)
    difference = float((ours - theirs).abs().max())  # not a number where either is not
    if not theirs.isfinite().all():
        raise UserError(f"{source}: the model's log-probs are not finite; use another checkpoint.")
    limit = limit_for(float(theirs.abs().max()))
    if not difference <= limit:  # nor where it is not a number
        raise UserError(
            f"{source}: the converted model's log-probs differ from HuggingFace's by {difference:.2g} nats, more than "
            "rounding explains; it is of another model, or its conversion is wrong, which please report."
        )
    certificate = Certificate(
        family=description.family,
        source=_hashes(source),
        weights=manifest.weights,
        weights_bf16=manifest.weights_bf16,
        config=config_hash(folder),
        dtype=", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})),
        largest_difference=difference,
        limit=limit,
        tokens=len(ours),
        versions={package: metadata.version(package) for package in _PACKAGES},
    )
    write_certificate(folder, certificate)
    return certificate.sealed()


def _in_child(source: Path, folder: Path) -> Certificate:
    """As certify, in a process of its own that sees no GPU."""
    command = programs.command("tgdpo_megatron.checkpoint.certify", source, folder)
    done = subprocess.run(command, env=programs.environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == USER_ERROR:
        raise UserError(done.stdout.strip())
    if done.returncode:
        why = "memory may have run out" if done.returncode < 0 else "what it said is above"
        raise InterruptedWorkError(
            f"{source}: the comparison for the certificate ended with exit code {done.returncode}; {why}."
        )
    return read_certificate(folder)


def _sequences(vocab_size: int) -> list[Tensor]:
    """Random token ids, the same at every call. int64, of each of LENGTHS."""
    random = np.random.default_rng(0)
    return [torch.from_numpy(random.integers(0, vocab_size, length)) for length in LENGTHS]


@torch.no_grad()
def _huggingfaces(
    source: Path, dtypes: dict[str, torch.dtype], description: ModelDescription, sequences: list[Tensor]
) -> Tensor:
    """Log-prob of every token after the first of each sequence. [R] fp32.

    Args:
        dtypes: Dtype of each tensor in the checkpoint, to which it is rounded first.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    weights, embedding = HfWeights(source), "model.embed_tokens.weight"
    config = AutoConfig.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    if getattr(config, "sliding_window", None):
        config.sliding_window = min(config.sliding_window, _WINDOW)
    with without_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)

    def read(name: str) -> Tensor:
        stored = name if name in weights.names else embedding  # a tied output matrix that is not stored
        shape, dtype = weights.shape(stored), dtypes.get(stored, dtypes[embedding])
        return _in_fp32(shape, shape, lambda first, count: weights.rows(stored, first, count).to(dtype))

    with _progress(description, "HuggingFace's model") as done:
        lend(model.eval(), read, done)
        # All sequences in one batch, so that each weight is read once. Padding comes after a sequence's last token,
        # where causal attention does not see it.
        batch = torch.zeros(len(sequences), max(LENGTHS), dtype=torch.int64)
        for row, ids in enumerate(sequences):
            batch[row, : len(ids)] = ids
        logits = model(batch, use_cache=False).logits
    return torch.cat(
        [
            logits[row, : len(ids) - 1].log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
            for row, ids in enumerate(sequences)
        ]
    )


@torch.no_grad()
def _ours(folder: Path, index: Index, description: ModelDescription, sequences: list[Tensor]) -> Tensor:
    """The same log-probs from the checkpoint, by the model that is trained. [R] fp32.

    Args:
        index: The checkpoint's.
    """
    if description.sliding_window is not None:
        description = replace(description, sliding_window=min(description.sliding_window, _WINDOW))
    with _alone():
        # Imported here, where Megatron has been redirected to the CPU.
        from tgdpo_megatron.checkpoint.state import sharded_model_state
        from tgdpo_megatron.model.build import build_model, transformer_config

        config = Config.model_validate({"train": {"precision": "fp32"}})
        with torch.device("meta"):
            (model,) = build_model(description, transformer_config(description, config))
        keys = {name: part.key for name, part in sharded_model_state([model])["0"].items()}
        shapes = {tensor.key: tensor.shape for tensor in family_of(description).tensors(description)}
        padded = {name: weight.shape for name, weight in model.named_parameters()}

        def read(name: str) -> Tensor:
            key, shape = keys[name], shapes[keys[name]]

            def rows(first: int, count: int) -> Tensor:
                return read_rows(folder / WEIGHTS, index, key, first, (count, *shape[1:]))

            return _in_fp32(shape, padded[name], rows)  # the model's vocabulary is padded

        starts = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
        pair = PreparedPairs(
            tokens=torch.cat(sequences).numpy().astype(np.int32),
            starts=starts,
            prompt_lengths=np.ones(1, dtype=np.int32),
            hashes=np.empty((1, 0), dtype=np.uint8),
            rows=np.zeros(1, dtype=np.int64),
            summary=Summary(source="", pairs=1),
        )
        with _progress(description, "the converted model") as done:
            if description.tie_word_embeddings:  # the head multiplies by it without calling the embedding
                weight = read("embedding.word_embeddings.weight")
                model.embedding.word_embeddings.weight = Parameter(weight, requires_grad=False)
            lend(model.eval(), read, done)
            found: Tensor = model(make_batch(pair, [0]))[0]
    return found


def _in_fp32(shape: Sequence[int], padded: Sequence[int], rows: Callable[[int, int], Tensor]) -> Tensor:
    """A tensor in fp32, read some rows at a time, so that memory does not hold it twice.

    Args:
        shape: Of the tensor that is read.
        padded: Of the result, which may have more rows; these are 0.
        rows: (first row, number of rows) -> these rows, in any dtype.
    """
    whole = torch.zeros(tuple(padded))
    step = max(1, _BLOCK // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        count = min(step, shape[0] - first)
        whole[first : first + count] = rows(first, count)
    return whole


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Process groups of one process, as Megatron's layers need them."""
    from tgdpo_megatron.platform import cpu

    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    assert not dist.is_initialized(), "certify needs a process of its own"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def _progress(description: ModelDescription, what: str) -> Iterator[Callable[[int], Any]]:
    """A bar over the parameters of a model; none for a small one."""
    count = parameters(description)
    with tqdm(total=count, desc=f"checking {what}", unit="weight", unit_scale=True, disable=count < _SLOW) as bar:
        yield bar.update


def _hashes(source: Path) -> dict[str, str]:
    """SHA-256 of config.json and of every file of weights."""
    hashes = {}
    for path in (source / "config.json", *HfWeights(source).files):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


if __name__ == "__main__":  # the child; its refusal goes to stdout, where the parent reads it
    try:
        certify(*map(Path, sys.argv[1:]))
    except UserError as error:
        print(error)
        sys.exit(USER_ERROR)
