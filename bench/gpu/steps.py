"""Whole optimizer steps of our engine on a GPU: share of the card's peak, cached against live scores, scoring against
training; what the fp32 sums of the head's products cost in a step. With Transformer Engine's layers and optimizer where
it is installed, else with local layers and torch's.

    python -m bench.gpu.steps

As many layers of Llama-3-8B as fit (16 at most) with its vocabulary, bf16, UltraFeedback-like pairs packed to 8,192
tokens. Seconds are wall-clock, cutting the micro-batches included, until the device is done; cached and live steps in
turn on the same pairs with one optimizer. MFU: operations that the pairs need (bench.gpu.model.model_flops: 6 a weight
and token, 6 a head weight and labelled token, causal attention by sequence, a shared prompt once, nothing computed
again) over the time and 989 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from bench.gpu import device
from bench.gpu.model import (
    LAYERS,
    PACKED,
    SIZES,
    InPlace,
    describe,
    layers_that_fit,
    make_pairs,
    model_flops,
    tokens_of,
)
from bench.gpu.rate import PEAK, matrix_rate
from bench.heads import rounded_sums
from bench.process import one_rank
from bench.rows import Row, paired

SAME_LOSS = 1e-5
"""Cached and live scores of bf16 models come from the same products: what differs is the order of fp32 sums."""


def measure() -> Iterator[Row]:
    with one_rank():
        yield from _steps()


def _steps() -> Iterator[Row]:
    data, steps = make_pairs()
    model = describe(layers_that_fit())
    rate = matrix_rate()
    ours = InPlace(data, model)
    for pairs in steps:  # in the packs of its step, as live scores are
        ours.cache_scores(pairs)
    losses = []
    for live in (False, True):
        ours.ride(live)
        losses.append(ours.loss(steps[0]))
    yield Row(
        f"loss, |cached − live|, {LAYERS}",
        abs(losses[0] - losses[1]),
        target=SAME_LOSS,
        limit="0",
        note=f"loss {losses[0]:.4f}, policy ≠ reference",
    )
    seconds: dict[str, list[float]] = {"cached": [], "live": [], "score": [], "rounded": []}
    for number, pairs in enumerate(steps):
        for live in (False, True) if number % 2 else (True, False):  # neither is always the first
            ours.ride(live)
            seconds["live" if live else "cached"].append(device.timed(ours.step, pairs)[0])
        ours.ride(False)
        with rounded_sums():
            seconds["rounded"].append(device.timed(ours.step, pairs)[0])
        seconds["score"].append(device.timed(ours.score, ours.frozen_model("reference"), pairs)[0])
    counted = steps[1:]  # the first warms up
    seconds = {name: values[1:] for name, values in seconds.items()}
    achieved = [
        model_flops(data, pairs, model) / spent for pairs, spent in zip(counted, seconds["cached"], strict=True)
    ]
    tokens = [tokens_of(data, pairs) / spent for pairs, spent in zip(counted, seconds["cached"], strict=True)]
    shape = f"{model.num_layers} layers of 8B, {SIZES.pairs} pairs, {PACKED}"
    yield Row(
        f"step, cached, model FLOPs / 989 TFLOP/s (MFU), {LAYERS}",
        median(achieved) / PEAK,
        target=0.50,
        at_most=False,
        limit=f"{rate / PEAK:.2f}, the matrix rate",
        note=f"{median(tokens):.0f} real tokens/s, {median(seconds['cached']):.3f} s a step; {shape}",
        details={"seconds": seconds, "matrix rate": rate, "operations": [model_flops(data, p, model) for p in counted]},
    )
    yield Row(
        f"step, cached, model FLOPs / matrix rate, {LAYERS}", median(achieved) / rate, limit="1, without the optimizer"
    )
    yield paired(
        f"step, cached / live, {LAYERS}",
        seconds["cached"],
        seconds["live"],
        target=0.63,
        limit="6 / 10 of the products",
        note="the making of the cache not counted",
    )
    yield paired(
        f"step, cached, fp32 sums of the head's products / 16-bit logits, {LAYERS}",
        seconds["cached"],
        seconds["rounded"],
        target=1.03,
        limit=f"the head's own ratio for its share of a step; {model.num_layers} layers instead of 32 make it larger",
    )
    yield paired(
        f"scoring one frozen model / training, tokens per second, {LAYERS}",
        seconds["cached"],
        seconds["score"],
        target=2.6,
        at_most=False,
        limit="3",
        note="forward passes alone, without writing",
    )


if __name__ == "__main__":
    device.program(__doc__, measure)
