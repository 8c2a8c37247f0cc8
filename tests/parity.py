"""The layout matrix: every layout gives the log-probs, loss, gradients and updated weights of one process.

    python -m tests.parity [--only TEXT] [--json FILE]

The oracle is HuggingFace's Llama in this process with torch's AdamW and the TGDPO formula written out again;
no code of ours takes part in it. All fp32. Prints a table and exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tgdpo_megatron.config import Config, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from tgdpo_megatron.data.prepare import PreparedPairs, Summary
from tgdpo_megatron.losses import CHOSEN, REJECTED

LOSS = LossConfig(type="tgdpo", beta=0.1, alpha=0.5, beta_r=1.0)
PAIRS_PER_STEP, STEPS, LEARNING_RATE, CLIP_GRAD = 8, 2, 1e-3, 1.0
LIMITS = {"logps": 1e-5, "loss": 1e-5, "gradient": 1e-5, "grad norm": 1e-5, "weights": 5e-5, "ln 2": 1e-6}
"""Largest absolute error of each kind (relative for the gradient norm).

Weights are compared after two steps: Adam magnifies rounding where a gradient is near 0."""


@dataclass(frozen=True)
class Row:
    """One layout."""

    tp: int = 1
    pp: int = 1
    vp: int | None = None
    dp: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 2
    tied: bool = False
    recompute: str = "none"
    distributed_optimizer: bool = False
    tokens: int | None = None
    """Token budget of a micro-batch, instead of a number of pairs."""
    fixed: bool = False
    """Micro-batches padded to the budget."""
    overlap: bool = False
    """Gradients reduced and weights gathered while computing."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def layout(self) -> tuple[int, int, int]:
        return self.tp, self.pp, self.vp or 0

    @property
    def name(self) -> str:
        sizes = [f"TP{self.tp}"] if self.tp > 1 else []
        sizes += [f"PP{self.pp}"] if self.pp > 1 else []
        sizes += [f"VP{self.vp}"] if self.vp else []
        sizes += [f"DP{self.dp}"] if self.dp > 1 else []
        extras = {
            "sequence parallel": self.sequence_parallel,
            f"{self.recompute} recompute": self.recompute != "none",
            "distributed optimizer": self.distributed_optimizer,
            "overlap": self.overlap,
            "tied": self.tied,
        }
        words = ["×".join(sizes) or "TP1", *(word for word, on in extras.items() if on)]
        if self.tokens:
            return f"{', '.join(words)}, {'fixed ' if self.fixed else ''}packs of {self.tokens} tokens"
        return f"{', '.join(words)}, {self.micro_batch_size} per micro-batch"

    def config(self, folder: Path) -> Config:
        return Config(
            model=ModelConfig(checkpoint=folder / "policy"),
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=self.vp,
                sequence_parallel=self.sequence_parallel,
            ),
            loss=LOSS,
            optimizer=OptimizerConfig(
                lr=LEARNING_RATE,
                min_lr=LEARNING_RATE,
                clip_grad=CLIP_GRAD,
                use_distributed_optimizer=self.distributed_optimizer,
                overlap_grad_reduce=self.overlap,
                overlap_param_gather=self.overlap,
            ),
            train=TrainConfig(
                precision="fp32",
                global_batch_size=PAIRS_PER_STEP,
                micro_batch_size=self.micro_batch_size,
                micro_batch_tokens=self.tokens,
                fixed_micro_batches=self.fixed,
                recompute=self.recompute,
                train_iters=STEPS,
            ),
        )


ROWS = [
    *(Row(micro_batch_size=size) for size in (1, 2, 4)),
    Row(tied=True),
    Row(recompute="full"),
    Row(tp=2),
    Row(tp=2, tied=True),
    Row(tp=2, sequence_parallel=True),
    Row(pp=2),
    Row(pp=2, tied=True),
    Row(pp=2, vp=2),
    Row(dp=2),
    Row(dp=2, distributed_optimizer=True),
    Row(tp=4),
    Row(tp=4, sequence_parallel=True, tied=True),
    Row(pp=4),
    *(Row(tp=2, pp=2, micro_batch_size=size) for size in (1, 2, 4)),
    Row(tp=2, pp=2, sequence_parallel=True),
    Row(tp=2, pp=2, sequence_parallel=True, tied=True),
    Row(tp=2, pp=2, sequence_parallel=True, recompute="full"),
    Row(tp=2, pp=2, sequence_parallel=True, recompute="selective"),
    Row(tp=2, pp=2, vp=2, sequence_parallel=True),
    Row(tp=2, dp=2, sequence_parallel=True),
    Row(tp=2, dp=2, distributed_optimizer=True, micro_batch_size=4),
    Row(pp=2, dp=2, distributed_optimizer=True),
    Row(dp=2, distributed_optimizer=True, overlap=True),
    Row(dp=2, distributed_optimizer=True, overlap=True, tied=True),
    Row(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True, overlap=True),
    Row(pp=2, dp=2, distributed_optimizer=True, overlap=True),
    Row(pp=2, dp=2, distributed_optimizer=True, overlap=True, tied=True),
    Row(pp=2, vp=2, dp=2, distributed_optimizer=True, overlap=True, micro_batch_size=1),
    Row(tokens=80),
    Row(tokens=80, fixed=True),
    Row(tokens=1000),
    Row(dp=2, tokens=80),
    Row(pp=2, tokens=80, fixed=True),
    Row(pp=2, vp=2, tokens=80, fixed=True),
    Row(tp=2, pp=2, sequence_parallel=True, tokens=80),
    Row(tp=2, pp=2, sequence_parallel=True, tokens=80, fixed=True),
    Row(tp=2, pp=2, vp=2, sequence_parallel=True, tokens=80),
    Row(pp=2, dp=2, tokens=80, fixed=True, recompute="full"),
    Row(tp=2, dp=2, sequence_parallel=True, tokens=80, tied=True),
]


@dataclass
class Result:
    """Largest absolute errors of one layout and source of scores."""

    row: str
    scores: str
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(self.errors[kind] <= limit for kind, limit in LIMITS.items() if kind in self.errors)


# The oracle: HuggingFace, one process.


def make_model(seed: int, tied: bool) -> Any:
    """A small Llama with Llama-3.1's RoPE scaling, grouped queries and a vocabulary that pads unevenly."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        centre, spread = (1.0, 0.1) if "norm" in name else (0.0, 0.08)
        weight.data = centre + spread * torch.randn(weight.shape, generator=generator)
    return model


def make_pairs() -> PreparedPairs:
    """Random pairs of uneven lengths."""
    random = np.random.default_rng(7)
    sequences, prompts = [], []
    for _ in range(PAIRS_PER_STEP * STEPS):
        prompt = random.integers(0, 300, random.integers(3, 13))
        prompts.append(len(prompt))
        sequences += [np.concatenate([prompt, random.integers(0, 300, random.integers(2, 21))]) for _ in range(2)]
    number = len(prompts)
    return PreparedPairs(
        tokens=np.concatenate(sequences).astype(np.int32),
        starts=np.cumsum([0, *map(len, sequences)]).astype(np.int64),
        prompt_lengths=np.asarray(prompts, dtype=np.int32),
        hashes=np.stack([np.full(32, pair, dtype=np.uint8) for pair in range(number)]),
        rows=np.arange(number),
        summary=Summary(source="random"),
    )


def token_logps(model: Any, data: PreparedPairs, pair: int, side: int) -> torch.Tensor:
    """Log-probs of a response's tokens, each sequence by itself."""
    ids = torch.from_numpy(data.sequence(pair, side).astype(np.int64))
    logits = model(ids[None]).logits[0].double()
    prompt = int(data.prompt_lengths[pair])
    return torch.log_softmax(logits[prompt - 1 : -1], dim=-1).gather(1, ids[prompt:, None])[:, 0]


def oracle(data: PreparedPairs, tied: bool) -> dict[str, Any]:
    """Everything the layouts must reproduce."""
    policy, reference, guidance = (make_model(seed, tied) for seed in (0, 1, 2))
    everything = [(pair, side) for pair in range(len(data)) for side in (CHOSEN, REJECTED)]
    with torch.no_grad():
        frozen = {
            name: {key: token_logps(model, data, *key) for key in everything}
            for name, model in (("policy", policy), ("reference", reference), ("guidance", guidance))
        }
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, eps=1e-8)
    losses, gradients, norms = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for pair in range(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP):
            margin = torch.zeros((), dtype=torch.float64)
            for side, sign in ((CHOSEN, 1.0), (REJECTED, -1.0)):
                ref, guide = frozen["reference"][pair, side], frozen["guidance"][pair, side]
                weight = 1 + sign * LOSS.alpha * LOSS.token_reward_scale * (guide - ref)
                ratio = token_logps(policy, data, pair, side) - ref
                margin = margin + sign * LOSS.beta * (weight * ratio).sum()
            total = total + torch.nn.functional.softplus(-margin)
        (total / PAIRS_PER_STEP).backward()
        losses.append(float(total) / PAIRS_PER_STEP)
        gradients.append({name: weight.grad.clone() for name, weight in policy.named_parameters()})
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP_GRAD)))
        optimizer.step()
    weights = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    return {"frozen": frozen, "losses": losses, "norms": norms, "gradient": gradients[0], "weights": weights}


# One rank of a layout.


def run_rows(folder: Path, world_size: int, only: str, output: Path) -> None:
    """Run all rows of a world size on this rank and let the first rank write the results."""
    from megatron.core import parallel_state

    from tgdpo_megatron.platform.processes import initialize_model_parallel, job

    results = []
    with job("tests.parity", processes=world_size, timeout_minutes=2) as ranks:
        torch.set_num_threads(1)
        layout = None
        rows = [row for row in ROWS if row.world_size == world_size and only in row.name]
        for row in sorted(rows, key=lambda row: row.layout):
            if row.layout != layout:  # once for each: gloo's groups keep their threads until the process ends
                if layout is not None:
                    parallel_state.destroy_model_parallel()
                initialize_model_parallel(row.config(folder).parallel, seed=1)
                layout = row.layout
            tied_folder = folder / ("tied" if row.tied else "untied")
            expected = torch.load(tied_folder / "oracle.pt", weights_only=False)
            for scores in ("live", "cached"):
                started = time.monotonic()
                errors = _compare(row, scores, tied_folder, expected)
                results.append(Result(row.name, scores, errors, time.monotonic() - started))
                if ranks.is_first:
                    print(f"  {row.name}, {scores}: {'pass' if results[-1].passed else 'FAIL'}", flush=True)
        if ranks.is_first:
            output.write_text(json.dumps([asdict(result) for result in results]))


def _compare(row: Row, scores: str, folder: Path, expected: dict[str, Any]) -> dict[str, float]:
    """Largest errors over all ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from tgdpo_megatron.checkpoint.manifest import describe
    from tgdpo_megatron.data.batch import rank_batches
    from tgdpo_megatron.engine import build_engine
    from tgdpo_megatron.losses import formula
    from tgdpo_megatron.report.metrics import add_up, names_for
    from tgdpo_megatron.train import forward_step

    data, config = make_pairs(), row.config(folder)
    description = describe(folder / "policy")
    frozen = [folder / "reference", folder / "guidance"] if scores == "live" else []
    engine = build_engine(config, description, start=folder / "policy", frozen=frozen)
    cached = _cached(data, expected["frozen"]) if scores == "cached" else None

    def batches(step: int) -> Any:
        picked = np.arange(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP)
        return rank_batches(
            data,
            picked,
            config,
            sides=(CHOSEN, REJECTED),
            rank=parallel_state.get_data_parallel_rank(),
            ranks=row.dp,
            device=torch.device("cpu"),
            scores=cached,
        )

    def losses(some_engine: Any, some_config: Config, step: int, forward_only: bool) -> float:
        run_micro_batch = partial(forward_step, config=some_config, formula=formula(some_config.loss))
        sums = some_engine.over(run_micro_batch, batches(step), forward_only=forward_only)()
        totals = add_up(sums, names=names_for(some_config.loss), counts_here=_counts_here(), device=torch.device("cpu"))
        return totals["loss"] / totals["pairs"]

    errors = {"logps": _logp_error(engine, batches(0), data, expected["frozen"])}
    engine.zero_grad()
    loss_errors = [abs(losses(engine, config, 0, False) - expected["losses"][0])]
    if not row.distributed_optimizer:  # which leaves each rank only its part of the gradient
        errors["gradient"] = _worst(engine.chunks, expected["gradient"], description, gradients=True)
    norm_errors = []
    for step in range(STEPS):
        if step:
            engine.zero_grad()
            loss_errors.append(abs(losses(engine, config, step, False) - expected["losses"][step]))
        norm, _ = engine.update(CLIP_GRAD)
        norm_errors.append(abs(norm / expected["norms"][step] - 1))
    errors["grad norm"] = max(norm_errors)
    errors["loss"] = max(loss_errors)
    engine.gather_weights()
    errors["weights"] = _worst(engine.chunks, expected["weights"], description, gradients=False)

    if scores == "live":  # step 0: the policy is the reference
        start = config.model_copy(update={"loss": LossConfig(type="dpo")})
        same = build_engine(start, description, start=folder / "policy", frozen=[folder / "policy"])
        with torch.no_grad():
            errors["ln 2"] = abs(losses(same, start, 0, True) - math.log(2))

    kinds = sorted(errors)
    worst = torch.tensor([errors[kind] for kind in kinds], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return dict(zip(kinds, worst.tolist(), strict=True))


def _counts_here() -> bool:
    from megatron.core import parallel_state

    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return bool(last and parallel_state.get_tensor_model_parallel_rank() == 0)


def _cached(data: PreparedPairs, frozen: dict[str, Any]) -> Any:
    """The oracle's frozen log-probs, as if read from disk."""
    from tgdpo_megatron.scores.store import TokenScores

    starts, offset = {}, 0
    for pair in range(len(data)):
        starts[data.hashes[pair].tobytes()] = offset
        offset += sum(data.response_length(pair, side) for side in (CHOSEN, REJECTED))
    order = [(pair, side) for pair in range(len(data)) for side in (CHOSEN, REJECTED)]
    values = {
        name: torch.cat([frozen[name][key] for key in order]).float().numpy() for name in ("reference", "guidance")
    }
    return TokenScores(manifest=None, values=values, starts=starts)  # type: ignore[arg-type]


def _logp_error(engine: Any, batches: Any, data: PreparedPairs, frozen: dict[str, Any]) -> float:
    """Largest error of any model's token log-probs on the first step's pairs."""
    from tgdpo_megatron.score import forward_step

    with torch.no_grad():
        outputs = engine.over(forward_step, batches, forward_only=True, collect_non_loss_data=True)()
    worst = 0.0
    for batch, logps in zip(batches, outputs, strict=False):
        if not batch.samples:
            continue
        for name, found in zip(("policy", "reference", "guidance"), logps, strict=False):
            wanted = torch.cat([frozen[name][pair, side] for pair in batch.samples for side in (CHOSEN, REJECTED)])
            worst = max(worst, float((found - wanted).abs().max()))
    return worst


def _worst(chunks: Any, hf: dict[str, torch.Tensor], description: Any, *, gradients: bool) -> float:
    """Largest difference between this rank's weights, or gradients, and the oracle's."""
    from tgdpo_megatron.checkpoint.fingerprint import sharded_tensors
    from tgdpo_megatron.checkpoint.names import llama_tensors
    from tgdpo_megatron.checkpoint.state import sharded_model_state

    with _gradients_as_weights(chunks) if gradients else _nothing():
        shards = [(shard, shard.data.clone()) for shard in sharded_tensors(sharded_model_state(chunks))]
    whole = {tensor.key: tensor.join([hf[name] for name in tensor.names]) for tensor in llama_tensors(description)}
    worst = 0.0
    for shard, found in shards:
        wanted = whole[shard.key]
        for axis, offset in enumerate(shard.global_offset):
            length = max(0, min(shard.local_shape[axis], wanted.size(axis) - offset))  # padded vocabulary: fewer
            wanted, found = wanted.narrow(axis, min(offset, wanted.size(axis)), length), found.narrow(axis, 0, length)
        if wanted.numel():
            worst = max(worst, float((found - wanted).abs().max()))
    return worst


class _gradients_as_weights:
    """Lets the checkpoint code cut gradients as it cuts weights."""

    def __init__(self, chunks: Any) -> None:
        self.parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]

    def __enter__(self) -> None:
        self.weights = [parameter.data for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.data = parameter.main_grad

    def __exit__(self, *_: Any) -> None:
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            parameter.data = weight


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


# The matrix.


def run_matrix(folder: Path, only: str = "") -> list[Result]:
    """Run every row whose name contains `only`; results in the order of ROWS."""
    import subprocess

    from tgdpo_megatron.checkpoint.convert import hf_to_megatron

    data = make_pairs()
    results: list[Result] = []
    for tied in (False, True):
        place = folder / ("tied" if tied else "untied")
        for seed, role in enumerate(("policy", "reference", "guidance")):
            make_model(seed, tied).save_pretrained(place / "hf" / role)
            hf_to_megatron(place / "hf" / role, place / role)
        torch.save(oracle(data, tied), place / "oracle.pt")
    for world_size in sorted({row.world_size for row in ROWS if only in row.name}):
        output = folder / f"results-{world_size}.json"
        command = [sys.executable, "-m", "tests.parity", "--worker", str(folder), str(world_size), str(output)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--only", only], env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"the ranks of world size {world_size} failed with exit code {done.returncode}")
        results += [Result(**result) for result in json.loads(output.read_text())]
    order = {row.name: place for place, row in enumerate(ROWS)}
    return sorted(results, key=lambda result: order[result.row])


def table(results: list[Result]) -> str:
    """One line per row and source of scores, with the largest error of each kind."""
    width = max(len(result.row) for result in results)
    lines = [f"{'layout':{width}}  scores  " + "  ".join(f"{kind:>9}" for kind in LIMITS)]
    for result in results:
        cells = "  ".join(f"{result.errors[kind]:9.1e}" if kind in result.errors else f"{'–':>9}" for kind in LIMITS)
        lines.append(f"{result.row:{width}}  {result.scores:6}  {cells}  {'pass' if result.passed else 'FAIL'}")
    worst = "  ".join(
        f"{max((result.errors[kind] for result in results if kind in result.errors), default=0):9.1e}"
        for kind in LIMITS
    )
    lines.append(f"{'largest':{width}}          {worst}")
    lines.append(f"{'limit':{width}}          " + "  ".join(f"{limit:9.1e}" for limit in LIMITS.values()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run rows whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "WORLD_SIZE", "OUTPUT"), help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.worker:
        folder, world_size, output = parsed.worker
        return run_rows(Path(folder), int(world_size), parsed.only, Path(output))
    with tempfile.TemporaryDirectory() as folder:
        results = run_matrix(Path(folder), parsed.only)
    print(table(results))
    if parsed.json:
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    sys.exit(0 if all(result.passed for result in results) else 1)


if __name__ == "__main__":
    main()
