"""Memory of training and of scoring by phase, as the GPU's allocator counts it, against the plan of planning/memory.py.

    python -m bench.gpu.memory

Layers of Llama-3-8B with its vocabulary, bf16, packs of 8,192 tokens; the plan is told the tokens and labels of the
largest pack. A row is the phase that is furthest off.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.gpu import device
from bench.gpu.model import LAYERS, PACKED, SIZES, InPlace, describe, make_pairs
from bench.process import one_rank
from bench.rows import Row
from tgdpo_megatron.data.batch import Batch
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.model.build import HAVE_TRANSFORMER_ENGINE
from tgdpo_megatron.planning import memory
from tgdpo_megatron.planning.load import Load, Program

CASES: dict[str, dict[str, Any]] = {
    "cached": {"live": False},
    "live": {"live": True},
    "cached, full recompute": {"live": False, "recompute": "full"},
    "cached, selective recompute": {"live": False, "recompute": "selective"},
}


def measure() -> Iterator[Row]:
    with one_rank():
        for words, case in CASES.items():
            yield _row(f"training, {words}", *_training(**case))
            device.free()
        yield _row("scoring", *_scoring())


def _row(words: str, found: dict[str, int], plan: memory.Plan) -> Row:
    off = {name: plan.phase(name).bytes / max(1, bytes_) - 1 for name, bytes_ in found.items()}
    phases = ", ".join(f"{name} {bytes_ / device.GIB:.2f} GiB ({off[name]:+.1%})" for name, bytes_ in found.items())
    return Row(
        f"memory, largest |plan / measured − 1|, {words}, {LAYERS}",
        max(map(abs, off.values())),
        target=0.05,
        limit="0; planned: see the brackets",
        note=f"{phases}; {SIZES.few_layers} layers of 8B, {PACKED}",
        details={"measured": found, "planned": {phase.name: phase.parts for phase in plan.phases}},
    )


def _training(live: bool, **train: Any) -> tuple[dict[str, int], memory.Plan]:
    data, pairs = _few_pairs()
    before = device.allocated()
    ours = InPlace(data, describe(SIZES.few_layers), **train)
    ours.cache_scores(pairs)
    if not live:
        ours.frozen.clear()
    ours.ride(live)
    ours.step(pairs)  # Adam's moments are made in the first step
    device.free()
    found = {"weights and optimizer": device.allocated() - before}
    ours.engine.zero_grad()
    batches = ours.batches(pairs)
    schedule, _ = device.peak(partial(ours.engine.forward_backward, batches))
    update, _ = device.peak(ours.engine.update)
    found |= {"forward and backward": schedule - before, "optimizer step": update - before}
    return found, _plan(ours, "train", batches)


def _scoring() -> tuple[dict[str, int], memory.Plan]:
    """Of the reference and the guidance together, as recipes.score runs them."""
    data, pairs = _few_pairs()
    before = device.allocated()
    ours = InPlace(data, describe(SIZES.few_layers), trained=False)
    reference, guidance = (ours.frozen_model(role) for role in ours.config.loss.frozen_models)
    for first, second in zip(reference, guidance, strict=True):
        first.carry([second])
    ours.score(reference, pairs)  # loads kernels
    device.free()
    found = {"weights": device.allocated() - before}
    scoring, _ = device.peak(ours.score, reference, pairs)
    return found | {"scoring": scoring - before}, _plan(ours, "score", ours.batches(pairs))


def _few_pairs() -> tuple[PreparedPairs, list[int]]:
    """Two packs' worth."""
    data, (pairs, *_) = make_pairs(1)
    return data, pairs[: len(pairs) // 2]


def _plan(ours: InPlace, program: Program, batches: list[Batch]) -> memory.Plan:
    largest = max(batches, key=lambda batch: len(batch.tokens))
    return memory.plan(
        ours.config,
        ours.description,
        world_size=1,
        program=program,
        device="cpu" if device.REHEARSAL else "cuda",
        transformer_engine=HAVE_TRANSFORMER_ENGINE,
        load=Load.of(largest),
        micro_batches=len(batches),
    )


if __name__ == "__main__":
    device.program(__doc__, measure)
