"""Where the time of a cached, packed step goes on a GPU: its kernels, its idle time, and how often the host waits.

    python -m bench.gpu.profile

Recorded by torch's profiler over two steps. Waits are calls that block the host until the GPU is done, and copies from
the GPU to the host. Those of a micro-batch: what a step over twice the pairs has more, over the micro-batches it has
more; the rest are of the step. Idle: time between a step's first and last kernel in which none runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from bench.gpu import device
from bench.gpu.model import LAYERS, PACKED, SIZES, InPlace, describe, make_pairs
from bench.process import one_rank
from bench.rows import Row

Event = dict[str, Any]
TOP = 15
ON_DEVICE = {"cpu_op"} if device.REHEARSAL else {"kernel", "gpu_memcpy", "gpu_memset"}
KINDS = {
    "attention": r"fmha|flash|attention|cudnn.*sdpa",
    "matrix products": r"gemm|nvjet|cutlass|xmma|aten::(add)?mm",
    "optimizer": r"multi_tensor|adam|foreach",
    "norms": r"norm",
    "copies": r"memcpy|memset|copy",
}
"""By what a kernel's name contains; the first that fits."""


def measure() -> Iterator[Row]:
    with one_rank():
        data, (warm_up, first, second) = make_pairs(3)
        ours = InPlace(data, describe(SIZES.few_layers), frozen=False)
        ours.scores = random_scores(ours)
        ours.step(warm_up)
        ours.step(first + second)
        twice = len(ours.batches(first + second))
        once = len(ours.batches(first))
        more, waits = (waits_of(device.profile(ours.step, pairs)) for pairs in (first + second, first))
        shape = f"{SIZES.few_layers} layers of 8B, cached, {PACKED}"
        for kind in more:
            each = (more[kind] - waits[kind]) / (twice - once)
            yield Row(
                f"{kind} in a micro-batch, {LAYERS}",
                each,
                target=0,
                limit="0",
                note=f"{waits[kind]} in a step of {once} micro-batches, {more[kind]} in one of {twice}: "
                f"{waits[kind] - once * each:.0f} are the step's, one of these the profiler's; {shape}",
            )
        events = device.profile(lambda: [ours.step(pairs) for pairs in (first, second)])
        yield Row(f"idle share of a step, {LAYERS}", idle_share(events), limit="0", note=f"profiler on; {shape}")
        yield from _shares(events)


def random_scores(ours: InPlace) -> Any:
    """Cached scores of any value: they cost what real ones cost."""
    import numpy as np

    from tgdpo_megatron.data.token_scores import TokenScores, response_starts

    number = response_starts(ours.data)[-1]
    values = np.random.default_rng(0).normal(-12, 1, number).astype(np.float32)
    return TokenScores.of(ours.data, dict.fromkeys(ours.config.loss.carried, values))


def waits_of(events: Sequence[Event]) -> dict[str, int]:
    """Kind of wait -> how often."""
    calls = Counter(event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver"))
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"]]
    read = [event for event in events if event["name"] == "aten::_local_scalar_dense"]  # a rehearsal has only these
    return {
        "host waits": sum(calls[name] for name in calls if name.endswith("Synchronize")) + len(read),
        "copies to the host": len(copies),
    }


def idle_share(events: Sequence[Event]) -> float:
    """Share of the time between the first and the last event on the device in which none runs."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in _on_device(events))
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def _on_device(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") in ON_DEVICE and "dur" in event]


def _shares(events: Sequence[Event]) -> Iterator[Row]:
    """Kinds of kernels, and the kernels that take longest, as shares of all kernels' time."""
    times: Counter[str] = Counter()
    for event in _on_device(events):
        times[event["name"]] += event["dur"]
    total = sum(times.values())
    kinds: Counter[str] = Counter()
    for name, spent in times.items():
        fits = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        kinds[next(fits, "other")] += spent
    top = {name: spent / total for name, spent in times.most_common(TOP)}
    for kind, spent in kinds.most_common():
        yield Row(f"share of kernel time, {kind}, {LAYERS}", spent / total)
    for name, share in top.items():
        yield Row(f"share of kernel time, {name[:60]}, {LAYERS}", share, details={"kernel": name})


if __name__ == "__main__":
    device.program(__doc__, measure)
