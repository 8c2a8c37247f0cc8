"""Records what a micro-batch does that would make a GPU wait for the host, or the host for a GPU."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.pretended_cuda import READS
from tgdpo_megatron.config import Config, LossConfig, ScoresConfig, TrainConfig
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel

aten: Any = torch.ops.aten
WAITS = READS | {
    aten.lift_fresh.default: "a tensor is made of Python numbers, and would be copied",
}
ROOT = Path(__file__).resolve().parent.parent.parent / "tgdpo_megatron"


class _Waits(TorchDispatchMode):
    """Lines of the product that call for a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reason = WAITS.get(func)
        if func is aten.index.Tensor and any(index is not None and index.dtype is torch.bool for index in args[1]):
            reason = "a boolean index"
        if reason is not None:
            ours = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
            if ours:
                self.found.append(f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}: {reason}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _device_waits(device: torch.device, found: list[str]) -> Iterator[None]:
    """On a GPU, also what CUDA itself says of calls that wait, whoever makes them."""
    if device.type == "cpu":
        yield
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [
        f"{warning.filename}:{warning.lineno} {warning.message}"
        for warning in seen
        if "synchroniz" in str(warning.message)
    ]


def record(
    ranks: Ranks, *, folder: str, losses: dict[str, dict[str, Any]], precision: str = "fp32"
) -> dict[str, list[str]]:
    """Loss type -> what waits within its micro-batches, forward and backward. Live where the method can be."""
    from bench.pairs import ultrafeedback_like
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.data.token_scores import TokenScores, response_starts
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.pair_losses import PreferenceLoss

    checkpoint = Path(folder)
    description = describe(checkpoint)
    data = ultrafeedback_like(2, longest=64, vocabulary=description.vocab_size)
    zeros = np.zeros(response_starts(data)[-1], np.float32)
    found = {}
    for name, settings in losses.items():
        loss = LossConfig(type=name, **settings)  # type: ignore[arg-type]
        live = loss.scores == loss.carried
        config = Config(
            loss=loss,
            scores=ScoresConfig(source="live" if live else "cached"),
            train=TrainConfig(precision=precision, train_iters=1),  # type: ignore[arg-type]
        )
        if not found:
            initialize_model_parallel(config.parallel, seed=1)
        frozen = [checkpoint for _ in loss.carried] if live else []
        engine = build_engine(config, description, loss=PreferenceLoss(config), start=checkpoint, frozen=frozen)
        scores = None if live else TokenScores.of(data, dict.fromkeys(loss.scores, zeros))
        batch = make_batch(data, [0, 1], scores=scores).to(ranks.device)
        for _ in range(2 if ranks.device.type == "cuda" else 1):  # kernels are loaded by the first
            engine.zero_grad()
            engine.chunks[0].set_input_tensor([None])
            with _Waits() as waits, _device_waits(ranks.device, waits.found):
                output, loss_of = engine.forward_step(iter([batch]), engine.chunks[0])
                total, _, _ = loss_of(output)
                total.backward()
            found[name] = waits.found
    return found


def whole_step(ranks: Ranks, *, folder: str, precision: str = "fp32", shared_prompts: bool = True) -> list[str]:
    """What waits in a whole TGDPO step of two micro-batches with two live models: from their copies to the update.

    With shared prompts, where each pair shares its own, attention picks the keys of its blocks.

    On a GPU by torch's own sync debug mode, the libraries' calls included; elsewhere the list is empty.
    """
    from bench.pairs import ultrafeedback_like
    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.data.batch import make_batch
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.pair_losses import PreferenceLoss

    checkpoint = Path(folder)
    description = describe(checkpoint)
    config = Config(
        loss=LossConfig(type="tgdpo"),
        train=TrainConfig(precision=precision, train_iters=8, shared_prompts=shared_prompts),  # type: ignore[arg-type]
    )
    initialize_model_parallel(config.parallel, seed=1)
    frozen = [checkpoint, checkpoint]
    engine = build_engine(config, description, loss=PreferenceLoss(config), start=checkpoint, frozen=frozen)
    data = ultrafeedback_like(4, longest=64, vocabulary=description.vocab_size)
    laid_out = [make_batch(data, pairs, shared_prompts=shared_prompts) for pairs in ([0, 1], [2, 3])]
    assert all((batch.plan.key_rows is not None) == shared_prompts for batch in laid_out)

    def step() -> None:
        batches = [batch.to(ranks.device) for batch in laid_out]
        engine.zero_grad()
        totals = engine.forward_backward(batches, lambda: {"stop": 0.0})
        assert totals["pairs"] == 4
        engine.update()

    found: list[str] = []
    for _ in range(2):  # kernels are loaded by the first
        step()
    with _device_waits(ranks.device, found):
        step()
    return found


def planted(ranks: Ranks) -> list[str]:
    """What the recorder says of lines that do wait."""
    values = torch.ones(3, device=ranks.device)
    lines: list[Callable[[torch.Tensor], Any]] = [
        lambda values: values.sum().item(),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: torch.tensor(3.0),
    ]
    global ROOT
    before, ROOT = ROOT, Path(__file__).resolve().parent
    with _Waits() as waits:
        for line in lines:
            line(values)
    ROOT = before
    return waits.found


def planted_on_device(ranks: Ranks) -> list[str]:
    """What CUDA says of a line that reads a number from the GPU."""
    found: list[str] = []
    values = torch.ones(3, device=ranks.device)
    with _device_waits(ranks.device, found):
        values.sum().item()
    return found
