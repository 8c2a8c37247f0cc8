"""Conversion against copying: a Llama-shaped checkpoint in shards of 1 GB, to Megatron's format and back.

    python -m bench.speed.convert

Wall-clock time, in turn with a copy in the same round. The copy reads every shard in pieces of 16 MiB, writes them to
the same disk, and waits for the disk after each shard. Before each measurement the source's pages are dropped from the
page cache, as far as the system allows, so that all read from the same place. Conversions are timed inside a fresh
process, without its imports, but with the start of the processes that share the work. Memory: the highest peak of any
process of a conversion, its libraries included. Everything is written below the folder for temporary files and deleted
after.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.files import program
from bench.process import peak_bytes
from bench.rows import Row, paired

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}
"""Llama-3.2-1B with ten more layers and an output layer of its own: 4.2 GB in bf16."""
SHARD_BYTES = 10**9
ROUNDS = 3
SLOWER = 3.0
PEAK = 1.5 * 2**30
PIECE = 16 * 2**20


def measure() -> Iterator[Row]:
    """Time of both directions with one process and with two, and the highest peak of memory."""
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_checkpoint(folder / "hf", SHAPE, SHARD_BYTES)
        for _ in range(ROUNDS):
            seconds.setdefault("copy", []).append(_copy(folder / "hf", folder / "copy"))
            for processes in (1, 2):
                for way, source, target in (("to Megatron", "hf", "megatron"), ("to HuggingFace", "megatron", "back")):
                    case = f"{way}, {processes} process{'es' if processes > 1 else ''}"
                    taken, peak = _in_fresh_process(folder / source, folder / target, processes)
                    seconds.setdefault(case, []).append(taken)
                    peaks[case] = max(peaks.get(case, 0), peak)
                shutil.rmtree(folder / "megatron")
                shutil.rmtree(folder / "back")
    copying = seconds.pop("copy")
    for case, taken in seconds.items():
        yield paired(
            f"conversion of {size / 1e9:.1f} GB against copying it: {case}",
            taken,
            copying,
            target=SLOWER,
            limit="1: to read, write and wait for the disk once",
            note=f"{min(taken):.1f} s against {min(copying):.1f} s at best",
        )
    yield Row(
        f"peak memory of a process that converts {size / 1e9:.1f} GB, GiB",
        max(peaks.values()) / 2**30,
        target=PEAK / 2**30,
        limit="a few blocks of 30 MB above what the libraries take",
        note="; ".join(f"{peak / 2**20:.0f} MiB {case}" for case, peak in peaks.items()),
    )


def make_checkpoint(folder: Path, shape: dict[str, Any], shard_bytes: int) -> int:
    """Write a Llama's config.json and random weights in bf16. Returns the bytes of the weights."""
    import torch

    from tgdpo_megatron.checkpoint import safetensors
    from tgdpo_megatron.model.families import family_of, read_description

    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    description = read_description(folder)
    tensors = [
        safetensors.HfTensor(name, size, torch.bfloat16)
        for tensor in family_of(description).tensors(description)
        for name, size in zip(tensor.names, tensor.shapes, strict=True)
    ]
    shards = safetensors.HfShards(tensors, shard_bytes)
    shards.begin(folder)
    rows = 1024
    noise = torch.randn(rows * 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number, tensor in enumerate(tensors):
        width = torch.Size(tensor.shape[1:]).numel()
        for first in range(0, tensor.shape[0], rows):
            some = (min(rows, tensor.shape[0] - first), *tensor.shape[1:])
            start = (number * 7919 + first) % (noise.numel() - some[0] * width + 1)
            shards.write(folder, tensor.name, first, noise[start : start + some[0] * width].view(some))
    shards.finish(folder)
    return sum(tensor.bytes for tensor in tensors)


def _copy(source: Path, target: Path) -> float:
    """Seconds of copying the shards of a folder."""
    target.mkdir()
    _forget(source)
    began = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as reading, (target / path.name).open("wb", buffering=0) as writing:
            while piece := reading.read(PIECE):
                writing.write(piece)
            os.fsync(writing.fileno())
    taken = time.monotonic() - began
    shutil.rmtree(target)
    return taken


def _forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_fresh_process(source: Path, target: Path, processes: int) -> tuple[float, float]:
    """Seconds and peak bytes of one conversion."""
    command = [sys.executable, "-m", "bench.speed.convert", "--convert", str(source), str(target), str(processes)]
    seconds, peak = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    return float(seconds), float(peak)


def convert(source: Path, target: Path, processes: int) -> tuple[float, int]:
    """Seconds of a conversion, to Megatron or back, and the peak bytes of the process that used most."""
    from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf

    # The comparison for the certificate is no part of the conversion: it computes log-probs.
    to_megatron = partial(hf_to_megatron, certificate=False)
    work: Callable[..., Any] = to_megatron if (source / "config.json").is_file() else megatron_to_hf
    _forget(source)
    began = time.monotonic()
    work(source, target, processes=processes)
    taken = time.monotonic() - began
    return taken, max(peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        print(*convert(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
    else:
        program(__doc__, measure)
