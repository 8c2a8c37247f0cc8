"""What a checkpoint costs a training that goes on meanwhile: time of the step loop, memory of the host, checksums.

    python -m bench.speed.saves

The model and the steps are those of bench.speed.steps: fp32, where weights and optimizer state are 16 bytes for each
parameter. The stall is what the training's own thread computes for a save: the forward pass that checks it, the
fingerprint, and the copy. Another thread writes, and makes the checkpoint current. The stall is CPU time of the
training's thread, because wall-clock time on a shared machine measures the others. The copy is timed alone, as copies
of the same tensors.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.files import program
from bench.ours import PAIRS_PER_STEP, Checkpoints, Ours, make_checkpoints
from bench.pairs import with_real_lengths
from bench.process import one_rank, peak_bytes, reset_peak, resident_bytes
from bench.rows import Row
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.checkpoint.saving import Save
from tgdpo_megatron.checkpoint.shards import model_shards, optimizer_shards
from tgdpo_megatron.checkpoint.state import begin_save, megatron_layout, sharded_model_state
from tgdpo_megatron.checkpoint.sums import first_damage

ROUNDS, LONGEST = 5, 512
HOST_BYTES = 16.0


def measure() -> Iterator[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory() as name, one_rank():
        yield from _rows(Path(name))


def _rows(folder: Path) -> Iterator[Row]:
    checkpoints = make_checkpoints(folder)
    ours = Ours(with_real_lengths(LONGEST), checkpoints, cached=True)
    pairs = list(range(PAIRS_PER_STEP))
    ours.cache_scores(pairs)
    ours.step(pairs)
    parameters = sum(weight.numel() for chunk in ours.engine.chunks for weight in chunk.parameters())
    seconds: dict[str, list[float]] = {"step": [], "stall": [], "copy": []}
    apart: dict[str, list[float]] = {"alone": [], "beside": []}
    memory = []
    for number in range(ROUNDS):
        apart["alone"].append(_clock(lambda: ours.step(pairs)))
        seconds["step"].append(_thread_seconds(lambda: ours.step(pairs)))
        seconds["copy"].append(_thread_seconds(lambda: _copies(ours)))
        target = folder / f"iter-{number + 1:07d}"
        saves: list[Save] = []
        stall = _thread_seconds(
            lambda target=target, saves=saves: saves.append(_begin(ours, checkpoints, target, pairs))
        )
        while saves[0].is_writing:
            apart["beside"].append(_clock(lambda: ours.step(pairs)))
        seconds["stall"].append(stall + _thread_seconds(saves[0].finish))
        # Without steps beside it, whose activations come and go.
        ctypes.CDLL(None).malloc_trim(0)  # so that nothing is copied into memory that was free already
        before = resident_bytes()
        reset_peak()
        _save(ours, checkpoints, folder / "alone" / target.name).finish()
        memory.append((peak_bytes() - before) / parameters)
    step, stall, copy = (median(seconds[name]) for name in ("step", "stall", "copy"))
    yield Row(
        "what a save stalls the training by, beyond the copy of the state, in steps",
        (stall - copy) / step,
        target=1.0,
        limit="0: everything but the copy beside the training",
        note=f"a step {step:.2f} s, the stall {stall:.2f} s, the copy {copy:.2f} s of CPU time; "
        f"{parameters / 1e6:.1f} million parameters",
        details=seconds,
    )
    if apart["beside"]:
        yield Row(
            "wall-clock time of a step while a checkpoint is written, against one otherwise",
            median(apart["beside"]) / median(apart["alone"]),
            note=f"{len(apart['beside'])} steps; the disk and the other core are shared with whatever runs here",
            details=apart,
        )
    copied = _copies(ours) / parameters
    yield Row(
        "memory of the host for a save, bytes for each parameter of a rank",
        copied,
        target=HOST_BYTES,
        limit="16 in fp32, 14 in bf16: the copy of weights and optimizer state",
        note=f"bytes copied; the process grew by {max(memory):.2f} at most, some MB of buffers and index included",
        details={"bytes": memory},
    )
    saved = max(folder.glob("iter-*"))
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    taken = _clock(lambda: first_damage(saved))
    yield Row(
        "gigabytes of a checkpoint that one core checks in a second",
        size / 1e9 / taken,
        note=f"SHA-256, {size / 1e6:.0f} MB; the ranks share the files",
    )


def _begin(ours: Ours, checkpoints: Checkpoints, target: Path, pairs: list[int]) -> Save:
    """As a training saves: check the loss, then begin."""
    ours.loss(pairs)
    return _save(ours, checkpoints, target)


def _save(ours: Ours, checkpoints: Checkpoints, target: Path) -> Save:
    engine, start = ours.engine, checkpoints.megatron["policy"]
    manifest = replace(read_manifest(start), iteration=1)
    return begin_save(
        target, engine.chunks, engine.optimizer, engine.scheduler, companions=start, manifest=manifest, background=True
    )


def _copies(ours: Ours) -> int:
    """Copy what a checkpoint holds. Returns the bytes of the copies."""
    chunks, optimizer = ours.engine.chunks, ours.engine.optimizer
    shards = model_shards(sharded_model_state(chunks))
    shards += optimizer_shards(optimizer, sharded_model_state(chunks)["0"], megatron_layout())[0]
    return sum(shard.data.nbytes for shard in [shard.copied() for shard in shards])


def _thread_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def _clock(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


if __name__ == "__main__":
    program(__doc__, measure)
