"""Changes that lower the memory of a configuration, and what they cost in time: single settings and whole layouts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tgdpo_megatron.config import Config, check_batch_layout, check_layout, load
from tgdpo_megatron.config.constants import round_up
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription, check_fp8_sizes, check_model_layout
from tgdpo_megatron.planning.load import Program, longest_pair
from tgdpo_megatron.planning.memory import LoadOf, Plan, plan, size
from tgdpo_megatron.planning.sizes import Device, Sizes


@dataclass(frozen=True)
class Remedy:
    """One change of a setting that saves memory.

    Attributes:
        change: `key=value`, as on the command line.
        frees: Bytes saved on the fullest rank.
        slower: Time of a step with the change, divided by the time without it. Estimated from operation counts.
        cost: The cost in words.
        world_size: Number of ranks that the change needs.
    """

    change: str
    frees: int
    slower: float
    cost: str
    world_size: int

    def sentence(self) -> str:
        """The change, what it frees, and what it costs."""
        return f"{self.change} frees {size(self.frees)} ({self.cost})"


def remedies(
    config: Config,
    description: ModelDescription,
    *,
    world_size: int,
    available: int | None = None,
    program: Program = "train",
    device: Device = "cuda",
    transformer_engine: bool = False,
    load_of: LoadOf | None = None,
) -> list[Remedy]:
    """The three cheapest single changes that save memory.

    Changes that are enough on their own come first, ordered by the time that they cost. The others follow, ordered by
    the time that they cost for each byte saved. Changes that need more ranks come last.

    Args:
        available: Bytes that a rank may use. None: no change counts as enough.
        load_of: As for plan.
    """
    where: dict[str, Any] = {"program": program, "device": device, "transformer_engine": transformer_engine}
    where["load_of"] = load_of
    now = plan(config, description, world_size=world_size, **where).bytes
    time = step_time(config, description, world_size=world_size)
    found = []
    for change, words, ranks in _candidates(config, description, program, world_size):
        changed = _changed(config, change)
        if not _accepted(changed, description, program, ranks):
            continue
        frees = now - plan(changed, description, world_size=ranks, **where).bytes
        slower = step_time(changed, description, world_size=ranks) / time
        if frees > 0.03 * now:
            found.append(Remedy(change, frees, slower, _cost(words, slower, program), ranks))

    def order(remedy: Remedy) -> tuple[Any, ...]:
        suffices = available is not None and now - remedy.frees <= available
        cost = max(0.0, remedy.slower - 1)
        return remedy.world_size > world_size, not suffices, cost if suffices else cost / remedy.frees, -remedy.frees

    return sorted(found, key=order)[:3]


def _candidates(
    config: Config, description: ModelDescription, program: Program, world_size: int
) -> Iterator[tuple[str, str, int]]:
    """Changes that may help: `key=value`, words about the cost, and the number of ranks that the change needs."""
    parallel, train = config.parallel, config.train
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    a_pair_at_once = False
    if program == "train":
        if config.live_models and "divergence" not in config.loss.method.reads:
            yield "scores.source=cached", "after one run of recipes.score", world_size
        if not config.optimizer.use_distributed_optimizer and world_size > parallel.model_parallel_size:
            yield "optimizer.use_distributed_optimizer=true", "", world_size
        if train.recompute == "none":
            yield "train.recompute=selective", "", world_size
        if train.recompute != "full":
            yield "train.recompute=full", "", world_size
    if train.micro_batch_tokens is not None:
        multiple = config.token_multiple
        least = round_up(longest_pair(config, description), multiple)
        fewer = max(least, train.micro_batch_tokens // (2 * multiple) * multiple)
        a_pair_at_once = fewer >= train.micro_batch_tokens
        if not a_pair_at_once:
            yield f"train.micro_batch_tokens={fewer}", "smaller matrix products", world_size
    elif train.micro_batch_size > 1:
        yield f"train.micro_batch_size={train.micro_batch_size // 2}", "smaller matrix products", world_size
    else:
        a_pair_at_once = True
    if tensor > 1 and not parallel.sequence_parallel:
        yield "parallel.sequence_parallel=true", "", world_size
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    if a_pair_at_once:  # then only a pair's own tokens can be split further
        sizes = {"context_parallel_size": parallel.context_parallel_size} | sizes
    for name, factor in sizes.items():
        fits = world_size % (2 * parallel.model_parallel_size) == 0
        ranks = world_size if fits else 2 * world_size
        yield f"parallel.{name}={2 * factor}", "" if fits else f"needs {ranks} ranks", ranks


def _changed(config: Config, change: str) -> Config:
    key, _, value = change.partition("=")
    group, _, name = key.partition(".")
    return load(config, {group: {name: value}}, where="the planner")


def _accepted(config: Config, description: ModelDescription, program: Program, world_size: int) -> bool:
    try:
        check_model_layout(description, config.parallel)
        if config.train.fp8:
            check_fp8_sizes(description, config)
        (check_batch_layout if program == "train" else check_layout)(config, world_size=world_size)
    except UserError:
        return False
    return True


def _cost(words: str, slower: float, program: Program) -> str:
    change = f"{abs(slower - 1):.0%} {'more' if slower > 1 else 'less'} time per step"
    if program == "score" or abs(slower - 1) < 0.005:
        return words or "costs next to nothing"
    return ", ".join(filter(None, [words, f"about {change}"]))


def step_time(config: Config, description: ModelDescription, *, world_size: int) -> float:
    """Estimated time of a training step. It is not measured and serves only to compare settings.

    The time is counted in a rank's floating-point operations per token of the step. Operations of the layers are
    increased by the traffic of tensor and context parallelism, at 370 GB/s against half of 989 TFLOP/s and without
    overlap. The sum is increased by the time in which the pipeline is idle.
    """
    rank = Sizes(config, description, "train", world_size)
    hidden, tensor = rank.hidden, config.parallel.tensor_model_parallel_size
    matrices = tensor * rank.layer_matrices
    attention = 2 * rank.query_channels * tensor * min(config.data.max_length, description.max_position_embeddings)
    again = {"none": 0.0, "selective": attention, "full": 2 * matrices + attention}[config.train.recompute]
    forward = 2 * matrices + attention
    layer = (rank.models + 2) * forward + again
    # Bytes that go over the wire for a token of a rank: tensor parallelism's hidden states, and the keys and values of
    # the other context-parallel ranks, their gradients, and both once more where attention is computed again.
    split = 10 * 2 * hidden * (tensor - 1) / tensor
    gathered = (2 if config.train.recompute == "none" else 3) * (rank.context - 1) * 2 * 2 * rank.key_channels
    traffic = (split + gathered) / 370e9 * 494e12 / (6 * rank.layer_matrices)
    idle = (rank.pipeline - 1) / (rank.virtual * rank.micro_batches)
    head = (rank.models + 3) * 2 * hidden * description.vocab_size  # backward computes its logits again
    return (description.num_layers * layer * (1 + traffic) + head) * (1 + idle) / world_size


def layouts(
    config: Config,
    description: ModelDescription,
    *,
    world_size: int,
    available: int,
    device: Device = "cuda",
    transformer_engine: bool = False,
    load_of: LoadOf | None = None,
) -> list[tuple[str, Plan]]:
    """Layouts of the same ranks that fit, fastest first: the changes to make, `key=value ...`, and the layout's plan.

    Tensor-parallel size, pipeline size and recomputation are varied. Sequence parallelism is on wherever there is
    tensor parallelism, and the pipeline is not interleaved. The context-parallel size is raised only where no layout
    fits as it is. Every other setting stays as it is.

    Args:
        load_of: As for plan.
    """
    where: dict[str, Any] = {"world_size": world_size, "device": device, "transformer_engine": transformer_engine}
    where["load_of"] = load_of
    context = config.parallel.context_parallel_size
    while context <= world_size:
        if found := _fitting(config, description, context, available, where):
            return found
        context *= 2
    return []


def _fitting(
    config: Config, description: ModelDescription, context: int, available: int, where: dict[str, Any]
) -> list[tuple[str, Plan]]:
    """The layouts with one context-parallel size that fit."""
    world_size, found = where["world_size"], []
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for tensor, pipeline, recompute in itertools.product(sizes, sizes, ("none", "selective", "full")):
        parallel = {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": None,
            "context_parallel_size": context,
            "sequence_parallel": tensor > 1,
        }
        changes: dict[str, dict[str, Any]] = {"parallel": parallel, "train": {"recompute": recompute}}
        changed = load(config, changes, where="the planner")
        if not _accepted(changed, description, "train", world_size):
            continue
        needs = plan(changed, description, **where)
        if needs.bytes <= available:
            found.append((step_time(changed, description, world_size=world_size), _difference(config, changes), needs))
    return [(words, needs) for _, words, needs in sorted(found, key=lambda layout: (layout[0], layout[2].bytes))]


def _difference(config: Config, changes: dict[str, dict[str, Any]]) -> str:
    """The changes that differ from the configuration, as on the command line."""
    different = [
        f"{group}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for group, values in changes.items()
        for name, value in values.items()
        if value != getattr(getattr(config, group), name)
    ]
    return " ".join(different) or "as it is"
