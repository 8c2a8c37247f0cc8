"""How much faster a step is with the policy's layers in FP8, for each of Megatron's recipes, and how its loss compares.

    python -m bench.gpu.fp8

The same steps as bench.gpu.steps, cached scores, Transformer Engine: first bf16, then each recipe, with engines built
one after the other since two do not fit. All start from the same weights. Drift and loss curves are bench.fp8's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.gpu import device
from bench.gpu.model import PACKED, InPlace, describe, layers_that_fit, make_pairs
from bench.process import one_rank
from bench.rows import Row, paired, skipped
from tgdpo_megatron.config.constants import FP8_FORMATS
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores
from tgdpo_megatron.model.build import HAVE_TRANSFORMER_ENGINE
from tgdpo_megatron.model.description import ModelDescription


def measure() -> Iterator[Row]:
    if not (HAVE_TRANSFORMER_ENGINE or device.REHEARSAL):
        yield skipped("step, bf16 / FP8", "Transformer Engine is not installed")
        return
    with one_rank():
        data, steps = make_pairs()
        model = describe(layers_that_fit())
        bf16, expected, scores = _run(model, data, steps, None)
        for recipe in FP8_FORMATS:
            # A rehearsal runs bf16 in FP8's place.
            settings = {} if device.REHEARSAL else {"fp8": FP8_FORMATS[recipe], "fp8_recipe": recipe}
            seconds, losses, _ = _run(model, data, steps, scores, **settings)
            apart = [abs(mine - theirs) for mine, theirs in zip(losses, expected, strict=True)]
            yield paired(
                f"step, bf16 / FP8 {recipe}",
                bf16,
                seconds,
                target=1.25,
                at_most=False,
                limit="below 2: attention, head, norms and AdamW stay bf16 and fp32",
                note=f"losses apart by at most {max(apart):.3f}; {model.num_layers} layers of 8B, cached, {PACKED}",
            )


def _run(
    model: ModelDescription, data: PreparedPairs, steps: list[list[int]], scores: TokenScores | None, **train: Any
) -> tuple[list[float], list[float], TokenScores | None]:
    """Seconds of each step but the first, every loss, and the cached scores."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(1)  # the same weights for all
    ours = InPlace(data, model, frozen=scores is None, **train)
    ours.scores = scores
    for pairs in steps if scores is None else ():
        ours.cache_scores(pairs)
    ours.frozen.clear()
    device.free()
    if train.get("fp8_recipe") == "delayed":
        ours.find_scales(steps[0])
    found = [device.timed(ours.step, pairs) for pairs in steps]
    scores = ours.scores
    del ours
    device.free()
    return [seconds for seconds, _ in found[1:]], [loss for _, loss in found], scores


if __name__ == "__main__":
    device.program(__doc__, measure)
