"""What does one rank of a layout find, and how far is it from the oracle?

python -m tests.parity.ranks FOLDER WORLD_SIZE OUTPUT --only TEXT       started by matrix.py
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parity.formulas import METHODS
from tests.parity.oracle import PAIRS_PER_STEP, STEPS, Scores, make_pairs
from tests.parity.rows import Result, Row, selected
from tgdpo_megatron.config import Config, LossConfig
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.losses import CHOSEN, REJECTED

STARTS_AT_LN_2 = {"TGDPO": LossConfig(type="dpo"), "TDPO1": METHODS["TDPO1"].ours, "TDPO2": METHODS["TDPO2"].ours}
"""Method -> a loss that is ln 2 where the policy is the reference: there TDPO's divergence is exactly 0."""


def run_rows(folder: Path, world_size: int, only: str, output: Path) -> None:
    """Run all rows of a world size on this rank and let the first rank write the results."""
    from megatron.core import parallel_state

    from tgdpo_megatron.platform.processes import initialize_model_parallel, job

    results = []
    with job("tests.parity.ranks", processes=world_size, timeout_minutes=2) as ranks:
        torch.set_num_threads(1)
        layout = None
        rows = [row for row in selected(only) if row.world_size == world_size]
        for row in sorted(rows, key=lambda row: row.layout):
            place = folder / row.models
            if row.layout != layout:  # once for each: gloo's groups keep their threads until the process ends
                if layout is not None:
                    parallel_state.destroy_model_parallel()
                initialize_model_parallel(row.config(place, "live").parallel, seed=1)
                layout = row.layout
            frozen = torch.load(place / "scores.pt", weights_only=False)
            expected = torch.load(place / f"{row.method}.pt", weights_only=False)
            for scores in row.sources:
                started = time.monotonic()
                found, errors = compare(row, scores, place, frozen, expected, device=ranks.device)
                seconds = time.monotonic() - started
                results.append(Result(row.name, row.family, row.method, scores, found, errors, seconds))
                if ranks.is_first:
                    print(f"  {row.name}, {scores}: {'pass' if results[-1].passed else 'FAIL'}", flush=True)
        if ranks.is_first:
            output.write_text(json.dumps([asdict(result) for result in results]))


def compare(
    row: Row, scores: str, folder: Path, frozen: Scores, expected: dict[str, Any], *, device: torch.device
) -> tuple[list[float], dict[str, float]]:
    """The loss of each step, and the largest errors over all ranks.

    Args:
        frozen, expected: What the oracle gives: scores, and a run of this row's method.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.data.batch import rank_batches
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.pair_losses import PreferenceLoss
    from tgdpo_megatron.preflight import carried_checkpoints

    data, config = make_pairs(), row.config(folder, scores)
    description = describe(folder / "policy")
    start = folder / "policy"
    frozen_at = carried_checkpoints(config)
    engine = build_engine(config, description, loss=PreferenceLoss(config), start=start, frozen=frozen_at)
    read = _from_files(config, data, frozen)
    sides = config.loss.method.sides

    def batches(step: int) -> Any:
        picked = np.arange(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP)
        return rank_batches(
            data,
            picked,
            config,
            sides=sides,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=row.dp,
            device=device,
            scores=read,
            context_rank=parallel_state.get_context_parallel_rank(),
        )

    def mean_loss(totals: dict[str, float]) -> float:
        return totals["loss"] / totals["pairs"]

    errors = _token_errors(engine, config, batches(0), frozen, sides)
    engine.zero_grad()
    found = [mean_loss(engine.forward_backward(batches(0)))]
    if not row.distributed_optimizer:  # which leaves each rank only its part of the gradient
        largest = max(float(gradient.abs().max()) for gradient in expected["gradient"].values())
        error = _worst(engine.chunks, expected["gradient"], description, gradients=True)
        errors["gradient"] = error / max(1.0, largest)
    norm_errors = []
    for step in range(STEPS):
        if step:
            engine.zero_grad()
            found.append(mean_loss(engine.forward_backward(batches(step))))
        norm, _ = engine.update()
        norm_errors.append(_distance(norm / expected["norms"][step], 1.0))
    errors["grad norm"] = max(norm_errors)
    errors["loss"] = max(
        _distance(ours, theirs) / max(1.0, abs(theirs)) for ours, theirs in zip(found, expected["losses"], strict=True)
    )
    engine.gather_weights()
    errors["weights"] = _worst(engine.chunks, expected["weights"], description, gradients=False)

    if scores == "live" and row.method in STARTS_AT_LN_2:  # step 0: the policy is the reference
        same_models = config.model_copy(update={"loss": STARTS_AT_LN_2[row.method]})
        same = build_engine(same_models, description, loss=PreferenceLoss(same_models), start=start, frozen=[start])
        errors["ln 2"] = abs(mean_loss(same.forward(batches(0))) - math.log(2))

    kinds = sorted(errors)
    worst = torch.tensor([errors[kind] for kind in kinds], dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return found, dict(zip(kinds, worst.tolist(), strict=True))


def _distance(found: torch.Tensor | float, wanted: torch.Tensor | float) -> float:
    """Largest absolute difference; infinite where one is not a number, which max() would pass over."""
    difference = torch.as_tensor(found, dtype=torch.float64).cpu() - torch.as_tensor(wanted, dtype=torch.float64)
    return float(difference.abs().nan_to_num(nan=math.inf, posinf=math.inf).max())


def _from_files(config: Config, data: PreparedPairs, frozen: Scores) -> Any:
    """The oracle's scores that do not ride with the policy, as if read from disk."""
    from tgdpo_megatron.data.token_scores import TokenScores

    riding = config.live_models
    names = [name for name in config.loss.scores if name not in riding]
    order = [(pair, side) for pair in range(len(data)) for side in (CHOSEN, REJECTED)]
    values = {name: torch.cat([frozen[name][key] for key in order]).float().numpy() for name in names}
    return TokenScores.of(data, values) if values else None


def _token_errors(
    engine: Any, config: Config, batches: Any, frozen: Scores, sides: tuple[int, ...]
) -> dict[str, float]:
    """Largest error of any model's token log-probs, and of the divergence, on the first step's pairs."""
    from tgdpo_megatron.engine import token_logps

    outputs = token_logps(engine.policy, batches, config)
    names = ["policy", *(config.live_models)]
    names += ["divergence"] if "divergence" in config.loss.method.reads else []
    errors = {"divergence" if name == "divergence" else "logps": 0.0 for name in names}
    for batch, found in zip(batches, outputs, strict=False):  # no outputs but on the last stage
        keys = [(pair, side) for pair in batch.samples for side in sides]
        for name, values in zip(names, found, strict=True) if keys else ():
            kind = "divergence" if name == "divergence" else "logps"
            wanted = torch.cat([frozen[name][key] for key in keys])
            errors[kind] = max(errors[kind], _distance(values, wanted))
    return errors


def _worst(chunks: Any, hf: dict[str, torch.Tensor], description: Any, *, gradients: bool) -> float:
    """Largest difference between this rank's weights, or gradients, and the oracle's."""
    from tgdpo_megatron.checkpoint.fingerprint import sharded_tensors
    from tgdpo_megatron.checkpoint.state import sharded_model_state
    from tgdpo_megatron.model.families import family_of

    with _gradients_as_weights(chunks) if gradients else _nothing():
        shards = [(shard, shard.data.clone()) for shard in sharded_tensors(sharded_model_state(chunks))]
    tensors = family_of(description).tensors(description)
    whole = {tensor.key: tensor.join([hf[name] for name in tensor.names]) for tensor in tensors}
    worst = 0.0
    for shard, found in shards:
        wanted = whole[shard.key]
        for axis, offset in enumerate(shard.global_offset):
            length = max(0, min(shard.local_shape[axis], wanted.size(axis) - offset))  # padded vocabulary: fewer
            wanted, found = wanted.narrow(axis, min(offset, wanted.size(axis)), length), found.narrow(axis, 0, length)
        if wanted.numel():
            worst = max(worst, _distance(found, wanted))
    return worst


class _gradients_as_weights:
    """Lets the checkpoint code cut gradients as it cuts weights."""

    def __init__(self, chunks: Any) -> None:
        self.parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]

    def __enter__(self) -> None:
        self.weights = [parameter.data for parameter in self.parameters]
        for parameter in self.parameters:
            # In the weight's dtype: with another, torch would forget the hook that Megatron adds gradients up with.
            parameter.data = parameter.main_grad.to(parameter.dtype)

    def __exit__(self, *_: Any) -> None:
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            parameter.data = weight


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("world_size", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", default="")
    parsed = parser.parse_args()
    run_rows(parsed.folder, parsed.world_size, parsed.only, parsed.output)


if __name__ == "__main__":
    main()
