"""How much memory a configuration needs on its fullest rank, phase by phase. Computed before anything is built.

The planner adds up the tensors that the programs hold: those that stay (sizes.py), and those that a pass holds for
backward or for a moment (held.py). A test compares the sums with tensors counted on a CPU
(tests/distributed/test_memory.py). What differs on a GPU or with Transformer Engine, whose layers keep less, was read
from their source code and not measured. Not counted are the CUDA context, workspaces of libraries, communication
buffers and gaps in the allocator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tgdpo_megatron.config import Config
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.planning.held import batches, forward_peak, kept_per_token, left_over, training_peak, update
from tgdpo_megatron.planning.load import Load, Program, largest_loads
from tgdpo_megatron.planning.sizes import Device, Sizes

GIB = 1 << 30
ROOM = 0.88
"""Share of a GPU's memory that a plan may take, by estimate. CUDA, libraries and allocator gaps take the rest."""


MASK = "mask of attention"
LoadOf = Callable[[Config], Load]
"""What a micro-batch of a configuration holds, where that follows from pairs that are there."""


@dataclass(frozen=True)
class Phase:
    """The memory in use at one moment of a program.

    Attributes:
        parts: Name of a part -> bytes.
    """

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """The memory that one rank needs.

    Attributes:
        stage: Index of the rank's pipeline stage.
        tokens: The tokens of a micro-batch, of all context-parallel ranks together.
        phases: The memory at rest, and at the peak of each later phase.
    """

    stage: int
    tokens: int
    phases: tuple[Phase, ...]

    @property
    def fullest(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def bytes(self) -> int:
        """Bytes of the fullest phase."""
        return self.fullest.bytes

    def phase(self, name: str) -> Phase:
        """The phase with this name."""
        return next(phase for phase in self.phases if phase.name == name)

    def sentence(self) -> str:
        """The bytes of the fullest phase and of its parts in words, the largest part first."""
        parts = sorted(self.fullest.parts.items(), key=lambda part: -part[1])
        named = ", ".join(f"{name} {size(amount)}" for name, amount in parts if amount >= 0.005 * self.bytes)
        return f"up to {size(self.bytes)} in '{self.fullest.name}' with {self.tokens} tokens at once ({named})"


def size(amount: float) -> str:
    """Bytes in words, to three digits."""
    for unit, bytes_ in {"GiB": GIB, "MiB": 1 << 20}.items():
        if amount >= bytes_:
            return f"{amount / bytes_:.{max(0, 2 - int(math.log10(amount / bytes_)))}f} {unit}"
    return f"{amount / 1024:.0f} KiB"


def plan(
    config: Config,
    description: ModelDescription,
    *,
    world_size: int,
    program: Program = "train",
    device: Device = "cuda",
    transformer_engine: bool = False,
    load: Load | None = None,
    load_of: LoadOf | None = None,
    micro_batches: int | None = None,
    stage: int | None = None,
) -> Plan:
    """The memory of the fullest rank, or of a rank of one pipeline stage.

    Frozen models are assumed to have the policy's shape.

    Args:
        world_size: Number of ranks.
        transformer_engine: Whether the layers are Transformer Engine's, and the optimizer is its own or apex's.
        load: What a micro-batch holds. Default: the largest that the configuration allows.
        load_of: Gives `load`, for callers that plan for more than one configuration.
        micro_batches: Micro-batches of a data-parallel rank per step. Default: as many as needed if all pairs have the
            greatest length.
        stage: Index of a pipeline stage. Default: the fullest stage.

    Returns:
        For training three phases. `weights and optimizer` is what stays in memory between steps, once the first update
        has made Adam's moments. `forward and backward` and `optimizer step` are the peaks of any step after the first.
        For scoring two phases: `weights` and `scoring`.

    Raises:
        UserError: The layout does not fit the number of ranks, as in check_layout.
    """
    stages = range(config.parallel.pipeline_model_parallel_size) if stage is None else [stage]
    plans = []
    if load is None and load_of is not None:
        load = load_of(config)
    for micro_batch in [load] if load is not None else largest_loads(config, description, program):
        rank = Sizes(
            config,
            description,
            program,
            world_size,
            device=device,
            transformer_engine=transformer_engine,
            load=micro_batch,
            micro_batches=micro_batches,
        )
        plans += [
            Plan(place, micro_batch.tokens * rank.context, tuple(_phases(rank, place, program))) for place in stages
        ]
    return max(plans, key=lambda found: found.bytes)


def _phases(rank: Sizes, stage: int, program: Program) -> Iterable[Phase]:
    """The phases of a program on one stage."""
    parameters = rank.parameters(stage)
    if program == "score":
        weights = {"frozen weights": rank.models * parameters * rank.width}
        scoring = {"batches": batches(rank), MASK: rank.mask, "working memory": forward_peak(rank, stage, rank.models)}
        yield _phase("weights", weights)
        yield _phase("scoring", weights | scoring)
        return
    shards = rank.data_parallel * rank.context if rank.config.optimizer.use_distributed_optimizer else 1
    resting = {
        "policy weights": parameters * rank.width,
        "gradients": parameters * 4,
        # Adam's two moments and, for bf16 weights, a master copy in fp32.
        "optimizer state": parameters * (12 if rank.width == 2 else 8) / shards,
        "frozen weights": (rank.models - 1) * parameters * rank.width,
        # FP8 copies of the linear layers' weights: one as they are and one transposed.
        "FP8 weights": 2 * rank.layers * rank.layer_matrices if rank.fp8 else 0,
        MASK: rank.mask,
    }
    between = {"kept from the last pass": left_over(rank, stage)}
    yield _phase("weights and optimizer", resting | between)
    moving = {
        "activations": rank.tokens * kept_per_token(rank, stage),
        "batches": batches(rank),
        "working memory": training_peak(rank, stage),
    }
    yield _phase("forward and backward", resting | moving)
    updating = {"batches": batches(rank), "working memory": update(rank, stage, shards)}
    yield _phase("optimizer step", resting | between | updating)


def _phase(name: str, parts: dict[str, float]) -> Phase:
    return Phase(name, {part: round(amount) for part, amount in parts.items() if amount})
