"""Which layouts and methods are compared, and how closely?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tests.parity.formulas import METHODS
from tests.parity.models import FAMILIES
from tests.parity.oracle import CLIP_GRAD, LEARNING_RATE, PAIRS_PER_STEP, STEPS
from tgdpo_megatron.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScoresConfig,
    TrainConfig,
    complete,
)

LIMITS = {
    "logps": 1e-5,
    "divergence": 1e-5,
    "loss": 1e-5,
    "gradient": 1e-5,
    "grad norm": 1e-5,
    "weights": 5e-5,
    "ln 2": 1e-6,
}
"""Largest error of each kind: absolute; for the gradient norm relative; for a loss, or a gradient's largest element,
above 1 relative to it.

Weights are compared after two steps: Adam magnifies rounding where a gradient is near 0."""


@dataclass(frozen=True)
class Row:
    """One layout of one method."""

    method: str = "TGDPO"
    """A name in METHODS."""
    family: str = "llama"
    """A name in models.FAMILIES."""
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
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
    precision: Literal["bf16", "fp32"] = "fp32"
    shared: bool = True
    """Prompts computed once for both responses."""
    overlap: bool = False
    """Gradients reduced and weights gathered while computing."""
    in_tests: bool = False
    """Whether `make test` runs it, too. Every feature is in one of these rows, every loss at one layout."""
    one_source: bool = False
    """Whether scores come from the first of the method's sources alone."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the method's scores come from, one after another."""
        sources = METHODS[self.method].scores
        return sources[:1] if self.one_source else sources

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def models(self) -> str:
        """Folder of the row's models."""
        return f"{self.family}-{'tied' if self.tied else 'untied'}"

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return self.tp, self.pp, self.vp or 0, self.cp

    @property
    def name(self) -> str:
        sizes = [f"TP{self.tp}"] if self.tp > 1 else []
        sizes += [f"PP{self.pp}"] if self.pp > 1 else []
        sizes += [f"VP{self.vp}"] if self.vp else []
        sizes += [f"CP{self.cp}"] if self.cp > 1 else []
        sizes += [f"DP{self.dp}"] if self.dp > 1 else []
        extras = {
            "sequence parallel": self.sequence_parallel,
            f"{self.recompute} recompute": self.recompute != "none",
            "distributed optimizer": self.distributed_optimizer,
            "overlap": self.overlap,
            "tied": self.tied,
            "prompts apart": not self.shared,
            self.precision: self.precision != "fp32",
        }
        words = ["×".join(sizes) or "TP1", *(word for word, on in extras.items() if on)]
        pack = f"{'fixed ' if self.fixed else ''}packs of {self.tokens} tokens"
        words.append(pack if self.tokens else f"{self.micro_batch_size} per micro-batch")
        method = "" if self.method == "TGDPO" else f"{self.method}: "
        family = "" if self.family == "llama" else f"{self.family}: "
        return family + method + ", ".join(words)

    def config(self, folder: Path, scores: str) -> Config:
        """The run's configuration; a setting that the method does not read is refused."""
        loss = METHODS[self.method].ours
        config = Config(
            model=ModelConfig(checkpoint=folder / "policy", **{role: folder / role for role in loss.frozen_models}),
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=self.vp,
                context_parallel_size=self.cp,
                sequence_parallel=self.sequence_parallel,
            ),
            loss=loss,
            scores=ScoresConfig(source="cached" if scores == "cached" else "live"),
            optimizer=OptimizerConfig(
                lr=LEARNING_RATE,
                min_lr=LEARNING_RATE,
                clip_grad=CLIP_GRAD,
                adam_eps=METHODS[self.method].adam_eps_for(self.family),
                use_distributed_optimizer=self.distributed_optimizer,
                overlap_grad_reduce=self.overlap,
                overlap_param_gather=self.overlap,
            ),
            train=TrainConfig(
                precision=self.precision,
                global_batch_size=PAIRS_PER_STEP,
                micro_batch_size=self.micro_batch_size,
                micro_batch_tokens=self.tokens,
                fixed_micro_batches=self.fixed,
                shared_prompts=self.shared,
                recompute=self.recompute,
                train_iters=STEPS,
            ),
        )
        return complete(config, where=self.name)


LAYOUTS = [
    *(Row(micro_batch_size=size) for size in (1, 2, 4)),
    Row(tied=True, in_tests=True),
    Row(recompute="full", in_tests=True),
    Row(tp=2),
    Row(tp=2, tied=True),
    Row(tp=2, sequence_parallel=True, in_tests=True),
    Row(pp=2),
    Row(pp=2, tied=True, in_tests=True),
    Row(pp=2, vp=2, in_tests=True),
    Row(dp=2),
    Row(dp=2, distributed_optimizer=True, in_tests=True),
    Row(tp=4),
    Row(tp=4, sequence_parallel=True, tied=True, in_tests=True),
    Row(pp=4, in_tests=True),
    *(Row(tp=2, pp=2, micro_batch_size=size) for size in (1, 2, 4)),
    Row(tp=2, pp=2, sequence_parallel=True, in_tests=True),
    Row(tp=2, pp=2, sequence_parallel=True, tied=True),
    Row(tp=2, pp=2, sequence_parallel=True, recompute="full"),
    Row(tp=2, pp=2, sequence_parallel=True, recompute="selective", in_tests=True),
    Row(tp=2, pp=2, vp=2, sequence_parallel=True, in_tests=True),
    Row(tp=2, dp=2, sequence_parallel=True),
    Row(tp=2, dp=2, distributed_optimizer=True, micro_batch_size=4),
    Row(pp=2, dp=2, distributed_optimizer=True),
    Row(dp=2, distributed_optimizer=True, overlap=True),
    Row(dp=2, distributed_optimizer=True, overlap=True, tied=True),
    Row(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True, overlap=True, in_tests=True),
    Row(pp=2, dp=2, distributed_optimizer=True, overlap=True),
    Row(pp=2, dp=2, distributed_optimizer=True, overlap=True, tied=True, in_tests=True),
    Row(pp=2, vp=2, dp=2, distributed_optimizer=True, overlap=True, micro_batch_size=1, in_tests=True),
    # Two micro-batches, then four: Megatron learns from the first step when a chunk's gradients are complete.
    Row("SFT", pp=2, vp=2, dp=2, distributed_optimizer=True, overlap=True, tokens=42, in_tests=True),
    Row(tokens=80, in_tests=True),
    Row(tokens=80, fixed=True, in_tests=True),
    Row(tokens=1000),
    Row(dp=2, tokens=80, in_tests=True),
    Row(pp=2, tokens=80, fixed=True),
    Row(pp=2, vp=2, tokens=80, fixed=True, in_tests=True),
    Row(tp=2, pp=2, sequence_parallel=True, tokens=80, in_tests=True),
    Row(tp=2, pp=2, sequence_parallel=True, tokens=80, fixed=True),
    Row(tp=2, pp=2, vp=2, sequence_parallel=True, tokens=80),
    Row(pp=2, dp=2, tokens=80, fixed=True, recompute="full", in_tests=True),
    Row(tp=2, dp=2, sequence_parallel=True, tokens=80, tied=True),
    # Prompts of their own, where those of the rows above are shared.
    Row(shared=False),
    Row(tp=2, pp=2, sequence_parallel=True, shared=False, in_tests=True),
    Row(pp=2, vp=2, tokens=80, fixed=True, shared=False),
    # Each sequence is cut into 2 · CP chunks, some of a token or none.
    Row(cp=2, in_tests=True),
    Row(cp=2, shared=False, in_tests=True),
    Row(cp=2, recompute="selective", tokens=80, in_tests=True),
    Row(cp=2, recompute="full", tied=True),
    *(
        Row(cp=2, shared=shared, in_tests=shared, **layout)
        for layout in (
            {"tp": 2, "sequence_parallel": True},
            {"tp": 2},
            {"pp": 2, "tokens": 80, "fixed": True},
            {"pp": 2, "vp": 2},
            {"pp": 2, "vp": 2, "tokens": 80, "fixed": True},
            {"dp": 2, "distributed_optimizer": True, "overlap": True},
        )
        for shared in (True, False)
    ),
    Row(cp=4, in_tests=True),
    Row(cp=4, shared=False, micro_batch_size=1),
]

LAYOUTS_OF_EVERY_METHOD = [
    Row(tp=2, pp=2, sequence_parallel=True, in_tests=True),
    Row(dp=2),
    Row(pp=2, tokens=64),  # seven micro-batches, then six, of one pair and of two
    Row(cp=2),
]
LAYOUTS_OF_EVERY_FAMILY = [
    Row(),
    Row(tp=2, pp=2, sequence_parallel=True, in_tests=True),
    Row(tp=2, tied=True),
    Row(pp=2, tokens=80, tied=True),
    Row(cp=2),
]
ROWS = [
    *LAYOUTS,
    *(replace(layout, method=method) for method in METHODS if method != "TGDPO" for layout in LAYOUTS_OF_EVERY_METHOD),
    *(replace(layout, family=family) for family in FAMILIES if family != "llama" for layout in LAYOUTS_OF_EVERY_FAMILY),
    # What a layer or the head does in its own way: the soft-cap in the divergence, two RoPE tables, strips of queries.
    Row("TDPO2", "gemma2", tp=2, pp=2, sequence_parallel=True, in_tests=True),
    Row(family="gemma2", pp=2, vp=2, recompute="selective"),
    Row(family="gemma3_text", recompute="full", dp=2, distributed_optimizer=True),
    Row(family="qwen3", tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True, overlap=True),
]


IN_TESTS = "the rows of make test"


def selected(only: str) -> list[Row]:
    """The rows whose name contains a text; those of the tests for the text IN_TESTS.

    No loss can tell where its scores come from. The tests show that with TGDPO at every layout of theirs, and take one
    source for the other methods and families.
    """
    if only != IN_TESTS:
        return [row for row in ROWS if only in row.name]
    return [replace(row, one_source=row not in LAYOUTS) for row in ROWS if row.in_tests]


@dataclass
class Result:
    """Largest errors of one row and source of scores."""

    row: str
    family: str
    method: str
    scores: str
    losses: list[float]
    """Of each step, as our code gives them."""
    errors: dict[str, float]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(self.errors[kind] <= limit for kind, limit in LIMITS.items() if kind in self.errors)
