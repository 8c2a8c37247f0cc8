"""Counts the bytes of every tensor that is alive in a real training step or scoring pass, phase by phase."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tgdpo_megatron.config import Config
from tgdpo_megatron.data.batch import rank_batches
from tgdpo_megatron.data.prepare import PreparedPairs, Summary
from tgdpo_megatron.engine import Engine, build_engine, token_logps
from tgdpo_megatron.losses import CHOSEN, REJECTED
from tgdpo_megatron.model import vocabulary
from tgdpo_megatron.model.build import build_model, transformer_config
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.pair_losses import PreferenceLoss
from tgdpo_megatron.planning.load import Load
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that torch's operations made and that are still alive, and the most there were at once.

    What an operation uses inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def peak_of(self, work: Callable[[], Any]) -> int:
        """The most bytes that are alive at once while this is done."""
        self.peak = self.live
        work()
        return self.peak


def pairs_of(lengths: list[int], prompt: int, vocab_size: int, *, shared: bool = False) -> PreparedPairs:
    """Made-up pairs: each two sequences of the given length, whose prompts are the same or differ."""
    generator = np.random.default_rng(1)
    sequences = [length for length in lengths for _ in (CHOSEN, REJECTED)]
    tokens = generator.integers(0, vocab_size, sum(sequences)).astype(np.int32)
    starts = np.cumsum([0, *sequences]).astype(np.int64)
    if shared:
        for chosen, rejected in starts[:-1].reshape(-1, 2):
            tokens[rejected : rejected + prompt] = tokens[chosen : chosen + prompt]
    return PreparedPairs(
        tokens=tokens,
        starts=starts,
        prompt_lengths=np.full(len(lengths), prompt, dtype=np.int32),
        hashes=np.zeros((len(lengths), 32), dtype=np.uint8),
        rows=np.arange(len(lengths)),
        summary=Summary(source="made up"),
    )


def measure(ranks: Ranks, *, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each case, for each rank: bytes by phase, the load of its largest micro-batch, and of training the losses of
    two steps on the same pairs, summed over all pairs."""
    from megatron.core import parallel_state

    results = []
    for case in cases:
        mine = _measure(ranks, **case)
        everyone: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(everyone, mine)
        results.append(everyone)
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
    return results


def _measure(
    ranks: Ranks,
    *,
    settings: dict[str, Any],
    shape: dict[str, Any],
    lengths: list[int],
    prompt: int = 8,
    shared: bool = False,
    program: str = "train",
    tile: int = 1 << 22,
) -> dict[str, Any]:
    config, description = Config.model_validate(settings), ModelDescription(**shape)
    vocabulary.TILE_ELEMENTS["cpu"] = tile
    initialize_model_parallel(config.parallel, config.train.seed)
    pairs = pairs_of(lengths, prompt, description.vocab_size, shared=shared)
    with LiveBytes() as tracker:
        phases = _train if program == "train" else _score
        return phases(ranks, tracker, config, description, pairs)


def _batches(ranks: Ranks, config: Config, pairs: PreparedPairs, **settings: Any) -> list[Any]:
    from megatron.core import parallel_state

    return rank_batches(
        pairs,
        np.arange(len(pairs)),
        config,
        sides=(CHOSEN, REJECTED),
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        device=ranks.device,
        context_rank=parallel_state.get_context_parallel_rank(),
        **settings,
    )


def _train(
    ranks: Ranks, tracker: LiveBytes, config: Config, description: ModelDescription, pairs: PreparedPairs
) -> dict[str, Any]:
    config.train.train_iters = 1
    engine = build_engine(config, description, loss=PreferenceLoss(config), start=None, frozen=[])
    live = config.live_models
    carried = [build_model(description, transformer_config(description, config)) for _ in live]
    for place, chunk in enumerate(engine.chunks):
        chunk.carry([model[place] for model in carried], divergence="divergence" in config.loss.method.reads)
    batches = _batches(ranks, config, pairs)
    losses: list[float] = []
    for _ in range(2):  # Adam's moments are made in the first step
        engine.zero_grad()
        forward_backward = tracker.peak_of(lambda: losses.append(engine.forward_backward(batches)["loss"]))
        update = tracker.peak_of(engine.update)
    return {
        "weights and optimizer": tracker.live - sum(_bytes(batch) for batch in batches),
        "forward and backward": forward_backward,
        "optimizer step": update,
        "load": _load(batches, config),
        "losses": losses,
        **_counted(engine),
    }


def _score(
    ranks: Ranks, tracker: LiveBytes, config: Config, description: ModelDescription, pairs: PreparedPairs
) -> dict[str, Any]:
    models = [build_model(description, transformer_config(description, config)) for _ in config.loss.frozen_models]
    for chunk in (chunk for model in models for chunk in model):
        chunk.requires_grad_(False).eval()
    for place, chunk in enumerate(models[0]):
        chunk.carry([model[place] for model in models[1:]])
    weights = tracker.live
    batches = _batches(ranks, config, pairs)
    scoring = partial(token_logps, models[0], batches, config)
    return {"weights": weights, "scoring": tracker.peak_of(scoring), "load": _load(batches, config)}


def _load(batches: list[Any], config: Config) -> dict[str, int]:
    """The load of the micro-batch that has the most tokens."""
    loads = (Load.of(batch) for batch in batches)
    return asdict(max(loads, key=lambda load: load.tokens))


def _bytes(batch: Any) -> int:
    tensors = [
        value
        for part in (batch, batch.plan, batch.context_labels)
        if part is not None
        for value in vars(part).values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in [*tensors, batch.pairs.pair, batch.pairs.side, *batch.scores.values()])


def _counted(engine: Engine) -> dict[str, int]:
    """The same bytes asked of the tensors themselves."""
    parameters = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    state = 0
    for optimizer in (wrapper.optimizer for wrapper in optimizers):
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state += sum(master.nbytes for master in masters if master.untyped_storage()._cdata not in own)
        state += sum(value.nbytes for entry in optimizer.state.values() for value in entry.values() if value.dim())
    return {
        "policy weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.main_grad.nbytes for parameter in parameters),
        "optimizer state": state,
        "frozen weights": sum(
            parameter.nbytes for chunk in engine.chunks for model in chunk.frozen for parameter in model.parameters()
        ),
    }


def kept_by_layers(ranks: Ranks, *, cases: list[dict[str, Any]]) -> list[tuple[int, dict[str, int]]]:
    """Bytes of the distinct tensors that autograd keeps for backward of all layers, without weights, indices and the
    mask of attention, and the load of the batch, for each case on this rank."""
    from megatron.core import parallel_state

    found = []
    for case in cases:
        config, description = Config.model_validate(case["settings"]), ModelDescription(**case["shape"])
        initialize_model_parallel(config.parallel, config.train.seed)
        (chunk,) = build_model(description, transformer_config(description, config))
        chunk.decoder.final_layernorm = None
        pairs = pairs_of(case["lengths"], case["prompt"], description.vocab_size, shared=case["shared"])
        (batch,) = batches = _batches(ranks, config, pairs)
        weights = {parameter.untyped_storage()._cdata for parameter in chunk.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, Any] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = chunk.decode(batch, None)
        of_layers = (
            tensor
            for key, tensor in kept.items()
            if key not in weights and tensor.is_floating_point() and not tensor.isneginf().any()
        )
        found.append((sum(tensor.untyped_storage().nbytes() for tensor in of_layers), _load(batches, config)))
        del output, kept
        parallel_state.destroy_model_parallel()
    return found
