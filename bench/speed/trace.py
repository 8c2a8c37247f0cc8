"""What ranks wait for and what they send: Megatron's schedules and collectives, recorded while they run.

    python -m bench.speed.trace

Real gloo ranks run real optimizer steps of a small model; nothing is timed.

*Idle slots.* Each rank records the order in which its chunks go forward and backward over the micro-batches. The
recorded orders are then placed in slots of one length, a backward taking two, each no earlier than what it needs
from the neighbouring stage. The idle share of all slots must be (p − 1) / (v m + p − 1) for p stages, m
micro-batches, v chunks to a stage.

*Bytes.* Every call of a torch.distributed collective during one step is counted, with the bytes a ring sends per
rank: 2 (g − 1)/g of an all-reduced tensor over g ranks, (g − 1)/g of a gathered, scattered or broadcast one, all of
one sent to a neighbour. Compared, summed over ranks, with what the layout must send in fp32 for T tokens, R of them
labelled, n weights, hidden size H, L layers, keys of K channels together:

- tensor parallel with sequence parallelism, each of t ranks: 4 T H (t − 1)/t · (10 L + 4) — per layer four
  gathers or scatters forward, four backward, two gathers of inputs again for weight gradients; two each for the
  embedding and the head — and all-reduces of three numbers per label and of the (2 L + 1) H norm gradients;
- pipeline, together: 2 · 4 T H (p − 1), hidden states forward and their gradients back;
- data parallel with the distributed optimizer, each of d ranks: (4 + 4) n (d − 1)/d, gradients scattered and
  weights gathered;
- context parallel, each of c ranks: 4 T · 4 K L (c − 1)/c — keys and values of each layer gathered forward, their
  gradients scattered backward — and 4 R (c − 1)/c for the log-probs that are gathered for the loss; its ranks also
  share gradients and weights as data-parallel ones do, (4 + 4) n (c − 1)/c.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from bench.files import program
from bench.pairs import VOCABULARY, ultrafeedback_like
from bench.rows import Row
from tgdpo_megatron.config import Config, LossConfig, ParallelConfig, ScoresConfig, TrainConfig
from tgdpo_megatron.data.batch import Batch, rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.data.token_scores import TokenScores, response_starts
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.pair_losses import PreferenceLoss

if TYPE_CHECKING:
    from tgdpo_megatron.engine import Engine

MODEL = ModelDescription(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=VOCABULARY,
    max_position_embeddings=2048,
    layernorm_epsilon=1e-5,
    tie_word_embeddings=False,
    rotary_base=10000.0,
    rope_scaling_factor=None,
)
STAGES, CHUNKS, MICRO_BATCHES = (2, 4), (None, 2), (4, 8, 16)
TENSOR, PIPELINE, DATA = "tensor parallel with sequence parallelism", "pipeline parallel", "data parallel"
CONTEXT = "context parallel"
LAYOUTS = {
    2: {
        TENSOR: ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        PIPELINE: ParallelConfig(pipeline_model_parallel_size=2),
        DATA: ParallelConfig(),
        CONTEXT: ParallelConfig(context_parallel_size=2),
    },
    4: {CONTEXT: ParallelConfig(context_parallel_size=4)},
}
"""Number of ranks -> layouts whose bytes are counted."""
LIMITS = {
    TENSOR: "4 T H (t − 1)/t · (10 L + 4) per rank, and the head's and norms' all-reduces",
    PIPELINE: "2 · 4 T H (p − 1)",
    DATA: "(4 + 4) n (d − 1)/d per rank",
    CONTEXT: "(4 T · 4 K L + 4 R + (4 + 4) n) (c − 1)/c per rank",
}

Event = tuple[str, int, int]
"""`F` or `B`, chunk of this rank, micro-batch."""


def measure() -> list[Row]:
    """Rows of idle slots and of bytes."""
    found = {ranks: _run(ranks) for ranks in STAGES}
    return [
        *(_idle_row(stages, chunks, found[stages]["orders"]) for stages in STAGES for chunks in CHUNKS),
        *(_bytes_row(ranks, name, **counted) for ranks in STAGES for name, counted in found[ranks]["bytes"].items()),
    ]


def _run(ranks: int) -> Any:
    """What _record writes, from so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bench.speed.trace", "--record", str(ranks), str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True)
        return json.loads(output.read_text(encoding="utf-8"))


def _idle_row(stages: int, chunks: int | None, orders: dict[str, list[list[Event]]]) -> Row:
    worst, words = 0.0, []
    for number in MICRO_BATCHES:
        expected = (stages - 1) / ((chunks or 1) * number + stages - 1)
        found = idle_share(orders[f"{chunks} {number}"])
        worst = max(worst, abs(found / expected - 1))
        words.append(f"m = {number}: {found:.3f} ({expected:.3f})")
    return Row(
        f"idle pipeline slots, difference from the formula: {stages} stages, {_chunks(chunks)} each",
        worst,
        target=0.01,
        limit="0; the formula is (p − 1)/(v m + p − 1)",
        note=f"recorded idle share, in brackets by the formula: {', '.join(words)}",
    )


def _chunks(number: int | None) -> str:
    return f"{number} chunks" if number else "one chunk"


def idle_share(orders: list[list[Event]]) -> float:
    """Share of idle slots when every rank does its work in the recorded order, as early as it can.

    Args:
        orders: For each pipeline rank, what it did. Stage s of the model is chunk s // p of rank s % p.
    """
    stages = len(orders)
    last = stages * (1 + max(chunk for order in orders for _, chunk, _ in order)) - 1
    done: dict[Event, int] = {}
    free, next_event, busy = [0] * stages, [0] * stages, 0
    while any(place < len(order) for place, order in zip(next_event, orders, strict=True)):
        before = len(done)
        for rank, order in enumerate(orders):
            while next_event[rank] < len(order):
                kind, chunk, micro_batch = order[next_event[rank]]
                stage = chunk * stages + rank
                needs = stage - 1 if kind == "F" else stage + 1
                ready = 0 if needs in (-1, last + 1) else done.get((kind, needs, micro_batch))
                if ready is None:
                    break
                slots = 1 if kind == "F" else 2
                free[rank] = done[kind, stage, micro_batch] = max(free[rank], ready) + slots
                busy += slots
                next_event[rank] += 1
        assert len(done) > before, "the recorded orders wait for each other"
    return 1 - busy / (stages * max(free))


def _bytes_row(ranks: int, name: str, sent: float, expected: float, calls: dict[str, int]) -> Row:
    return Row(
        f"bytes sent in a step, difference from the formula: {ranks} ranks, {name}",
        abs(sent / expected - 1),
        target=0.05,
        limit=f"0; the formula is {LIMITS[name]}",
        note=f"{sent / 1e6:.2f} MB counted, {expected / 1e6:.2f} MB by the formula",
        details={"calls of the first rank": calls},
    )


# One rank.


class Counted:
    """Counts what this rank gives to torch.distributed while `on`. Made before Megatron takes the functions' names."""

    def __init__(self) -> None:
        assert "megatron.core" not in sys.modules
        self.on = False
        self.bytes = 0.0
        self.calls: Counter[str] = Counter()
        for name, place, share in (
            ("all_reduce", 0, lambda size: 2 * (size - 1) / size),
            ("all_gather_into_tensor", 0, lambda size: (size - 1) / size),
            ("reduce_scatter_tensor", 1, lambda size: (size - 1) / size),
            ("broadcast", 0, lambda size: (size - 1) / size),
            ("isend", 0, lambda size: 1.0),
        ):
            self._wrap(name, place, share)

    def _wrap(self, name: str, place: int, share: Callable[[int], float]) -> None:
        """Replace torch.distributed.NAME; its argument at `place` is the tensor whose size counts."""
        real = getattr(dist, name)
        keyword = {"all_gather_into_tensor": "output_tensor", "reduce_scatter_tensor": "input"}.get(name, "tensor")

        def counting(*arguments: Any, **named: Any) -> Any:
            if self.on:
                tensor = arguments[place] if len(arguments) > place else named[keyword]
                size = dist.get_world_size(named.get("group"))
                self.bytes += tensor.numel() * tensor.element_size() * share(size)
                self.calls[name] += 1
            return real(*arguments, **named)

        setattr(dist, name, counting)
        if name == "isend":  # batched sends name the function and compare it with this module's
            dist.distributed_c10d.isend = counting


def _record(world_size: int, output: Path) -> None:
    """Record all schedules that take so many pipeline ranks, and the bytes of all layouts of as many ranks."""
    from tgdpo_megatron.platform.processes import job

    counted = Counted()
    with job("bench.speed.trace", processes=world_size, timeout_minutes=2) as ranks:
        torch.set_num_threads(1)
        orders = {
            f"{chunks} {number}": _order(world_size, chunks, number) for chunks in CHUNKS for number in MICRO_BATCHES
        }
        sent = {name: _sent(parallel, counted, world_size) for name, parallel in LAYOUTS[world_size].items()}
        if ranks.is_first:
            output.write_text(json.dumps({"orders": orders, "bytes": sent}), encoding="utf-8")


def _order(stages: int, chunks: int | None, number: int) -> list[list[Event]]:
    """What every pipeline rank did in one step of `number` micro-batches."""
    parallel = ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks)
    events: list[Event] = []

    def traced(engine: Engine, batches: list[Batch], iterator: Any, model: Any) -> Any:
        chunk = next(place for place, wrapped in enumerate(engine.policy) if wrapped is model)
        batch = next(iterator)
        micro_batch = next(place for place, one in enumerate(batches) if one is batch)
        events.append(("F", chunk, micro_batch))
        result, loss = engine.forward_step(iter([batch]), model)
        result.register_hook(lambda _: events.append(("B", chunk, micro_batch)))
        return result, loss

    with _engine(parallel, pairs=number) as (engine, batches, _):
        engine.zero_grad()
        _schedule(engine, partial(traced, engine, batches), batches)
    gathered: list[Any] = [None] * stages
    dist.all_gather_object(gathered, events)
    return gathered


def _schedule(engine: Engine, forward_step: Callable[..., Any], batches: list[Batch]) -> None:
    """The schedule alone, without the sum over ranks of what is reported."""
    from tgdpo_megatron.engine import run_pipeline

    run_pipeline(engine.policy, forward_step, batches, engine.config, forward_only=False)


def _sent(parallel: ParallelConfig, counted: Counted, world_size: int) -> dict[str, Any]:
    """Bytes that all ranks sent in the second optimizer step, and what they must send."""
    data_parallel_size = world_size // parallel.model_parallel_size
    with _engine(parallel, pairs=8, data_parallel_size=data_parallel_size) as (engine, batches, weights):
        for counts in (False, True):
            engine.zero_grad()
            counted.bytes, counted.on = 0.0, counts
            counted.calls.clear()
            _schedule(engine, engine.forward_step, batches)
            engine.update()
            counted.on = False
    everywhere: list[Any] = [None] * world_size
    tokens = parallel.context_parallel_size * sum(len(batch.tokens) for batch in batches)
    labels = sum(len(batch.pairs.pair) for batch in batches)
    dist.all_gather_object(everywhere, counted.bytes)
    expected = _expected(parallel, data_parallel_size, tokens, labels, weights)
    return {"sent": sum(everywhere), "expected": expected, "calls": dict(counted.calls)}


def _expected(parallel: ParallelConfig, data_parallel_size: int, tokens: int, labels: int, weights: int) -> float:
    """The formula of the module's first lines, over all ranks. Only one of the four sizes is more than 1."""
    hidden, layers = MODEL.hidden_size, MODEL.num_layers
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context, channels = parallel.context_parallel_size, MODEL.num_query_groups * MODEL.kv_channels
    sequence = 4 * tokens * hidden * (tensor - 1) / tensor * (10 * layers + 4)
    reduced = 4 * (3 * labels + (2 * layers + 1) * hidden) * 2 * (tensor - 1) / tensor
    pipeline = 2 * 4 * tokens * hidden * (stages - 1)
    data = 8 * weights * (data_parallel_size - 1) / data_parallel_size
    shared = (4 * tokens * 4 * channels * layers + 4 * labels + 8 * weights) * (context - 1) / context
    return tensor * (sequence + reduced) + pipeline + data_parallel_size * data + context * shared


@contextlib.contextmanager
def _engine(
    parallel: ParallelConfig, *, pairs: int, data_parallel_size: int = 1
) -> Iterator[tuple[Engine, list[Batch], int]]:
    """The engine at a layout, this rank's micro-batches, and its number of weights."""
    from megatron.core import parallel_state

    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.platform.processes import initialize_model_parallel

    data = ultrafeedback_like(pairs, longest=64)
    config = Config(
        parallel=parallel,
        loss=LossConfig(type="tgdpo"),
        scores=ScoresConfig(source="cached"),
        train=TrainConfig(precision="fp32", train_iters=1, global_batch_size=pairs, micro_batch_size=1),
    )
    initialize_model_parallel(parallel, seed=1)
    engine = build_engine(config, MODEL, loss=PreferenceLoss(config), start=None, frozen=[])
    batches = rank_batches(
        data,
        np.arange(len(data)),
        config,
        sides=(CHOSEN, REJECTED),
        rank=parallel_state.get_data_parallel_rank(),
        ranks=data_parallel_size,
        device=torch.device("cpu"),
        scores=_no_scores(data),
        context_rank=parallel_state.get_context_parallel_rank(),
    )
    weights = sum(weight.numel() for chunk in engine.chunks for weight in chunk.parameters())
    try:
        yield engine, batches, weights
    finally:
        parallel_state.destroy_model_parallel()


def _no_scores(data: PreparedPairs) -> TokenScores:
    """Cached scores of 0 for every token."""
    tokens = response_starts(data)[-1]
    return TokenScores.of(data, {name: np.zeros(tokens, np.float32) for name in ("reference", "guidance")})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        _record(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        program(__doc__, measure)
