"""How much memory a configuration needs on its fullest rank, phase by phase. Computed before anything is built.

The planner adds up the tensors that the programs hold. A test compares the sums with tensors counted on a CPU
(tests/distributed/test_memory.py). What differs on a GPU or with Transformer Engine, whose layers keep less, was read
from their source code and not measured. Not counted are the CUDA context, workspaces of libraries, communication
buffers and gaps in the allocator.

Legend: T tokens of a micro-batch, R labelled tokens of a micro-batch, H hidden size, F feed-forward channels, A query
channels and K key (or value) channels of a layer, V vocabulary, n parameters of a rank. F, A, K and V are the share of
one tensor-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tgdpo_megatron.config import Config, check_layout
from tgdpo_megatron.config.constants import (
    MIN_TILE_COLUMNS,
    SCORED_AT_ONCE,
    TILE_ELEMENTS,
    VOCAB_MULTIPLE,
    attention_rows,
)
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import layer_parameters

Program = Literal["train", "score"]
Device = Literal["cpu", "cuda"]

GIB = 1 << 30
ROOM = 0.88
"""Share of a GPU's memory that a plan may take, by estimate. CUDA, libraries and allocator gaps take the rest."""


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
        tokens: T, the tokens of a micro-batch.
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


def most_tokens(config: Config, description: ModelDescription, program: Program = "train") -> int:
    """The largest number of tokens that go through the model at once. The last token of a sequence never does."""
    pairs = config.train.micro_batch_size if config.train.micro_batch_tokens is None else SCORED_AT_ONCE
    if program == "score":
        pairs = min(pairs, SCORED_AT_ONCE)
    elif config.train.micro_batch_tokens is not None:
        return config.train.micro_batch_tokens
    most = -(-pairs * longest_pair(config, description) // config.token_multiple) * config.token_multiple
    return min(most, config.train.micro_batch_tokens or most)


def longest_pair(config: Config, description: ModelDescription) -> int:
    """The largest number of tokens of one pair that go through the model."""
    sequences = len(config.loss.method.sides)
    return sequences * (min(config.data.max_length, description.max_position_embeddings) - 1)


def plan(
    config: Config,
    description: ModelDescription,
    *,
    world_size: int,
    program: Program = "train",
    device: Device = "cuda",
    transformer_engine: bool = False,
    tokens: int | None = None,
    labelled: int | None = None,
    micro_batches: int | None = None,
    stage: int | None = None,
) -> Plan:
    """The memory of the fullest rank, or of a rank of one pipeline stage.

    Frozen models are assumed to have the policy's shape.

    Args:
        world_size: Number of ranks.
        transformer_engine: Whether the layers are Transformer Engine's, and the optimizer is its own or apex's.
        tokens: T. Default: the largest number that the configuration allows.
        labelled: R. Default: all of T.
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
    rank = Sizes(
        config,
        description,
        program,
        world_size,
        device=device,
        transformer_engine=transformer_engine,
        tokens=tokens,
        labelled=labelled,
        micro_batches=micro_batches,
    )
    stages = range(config.parallel.pipeline_model_parallel_size) if stage is None else [stage]
    plans = [Plan(place, rank.tokens, tuple(_phases(rank, place, program))) for place in stages]
    return max(plans, key=lambda found: found.bytes)


class Sizes:
    """Sizes of one rank's tensors, in elements unless stated otherwise."""

    def __init__(
        self,
        config: Config,
        description: ModelDescription,
        program: Program,
        world_size: int,
        *,
        device: Device = "cuda",
        transformer_engine: bool = False,
        tokens: int | None = None,
        labelled: int | None = None,
        micro_batches: int | None = None,
    ) -> None:
        self.config, self.description = config, description
        self.device, self.transformer_engine = device, transformer_engine
        self.fp8 = program == "train" and transformer_engine and config.train.fp8 is not None
        parallel, loss = config.parallel, config.loss
        tensor = parallel.tensor_model_parallel_size
        self.data_parallel = check_layout(config, world_size=world_size)
        self.tensor = tensor
        self.pipeline = parallel.pipeline_model_parallel_size
        self.virtual = parallel.virtual_pipeline_model_parallel_size or 1
        self.width = 2 if config.train.precision != "fp32" else 4  # bytes of a weight or an activation
        if program == "score":
            self.models = len(loss.frozen_models)
        else:
            self.models = 1 + len(config.live_models)

        self.longest = longest_pair(config, description) // len(loss.method.sides)
        self.tokens = tokens if tokens is not None else most_tokens(config, description, program)
        self.labelled = labelled if labelled is not None else self.tokens
        pairs = SCORED_AT_ONCE if program == "score" else -(-config.train.global_batch_size // self.data_parallel)
        at_once = max(1, most_tokens(config, description) // longest_pair(config, description))
        self.micro_batches = micro_batches if micro_batches is not None else -(-pairs // at_once)

        self.hidden = description.hidden_size
        self.channels = description.kv_channels
        self.heads = description.num_attention_heads / tensor
        self.queries = self.heads * self.channels
        self.keys = description.num_query_groups / tensor * self.channels
        self.feed_forward = description.ffn_hidden_size / tensor
        self.layers = description.num_layers // self.pipeline
        multiple = VOCAB_MULTIPLE * tensor
        self.padded_vocabulary = -(-description.vocab_size // multiple) * multiple / tensor
        self.vocabulary = min(description.vocab_size, self.padded_vocabulary)
        self.streams = self.hidden / tensor if parallel.sequence_parallel else self.hidden
        """Hidden channels per token that one rank holds between matrix products."""
        self.gathered = self.hidden if parallel.sequence_parallel else 0
        """Hidden channels per token that sequence parallelism gathers for a matrix product; 0 without it."""

    def parameters(self, stage: int) -> float:
        """n: parameters of one model on a rank of a pipeline stage."""
        hidden = self.hidden
        total = self.layers * (self.layer_matrices + layer_parameters(self.description)[1])
        matrices = int(stage == 0) + int(stage == self.pipeline - 1)
        if self.description.tie_word_embeddings:
            matrices = min(1, matrices)
        return total + matrices * self.padded_vocabulary * hidden + (hidden if stage == self.pipeline - 1 else 0)

    @property
    def layer_matrices(self) -> float:
        """This rank's share of the parameters in one layer's matrices."""
        return layer_parameters(self.description)[0] / self.tensor

    @property
    def largest_matrix(self) -> float:
        """Parameters in the largest single weight of this rank."""
        return self.hidden * max(2 * self.feed_forward, self.queries + 2 * self.keys, self.padded_vocabulary)

    @property
    def norm(self) -> float:
        """Bytes per hidden channel that a norm keeps for backward: its input and its output.

        The output is in FP8 where an FP8 layer reads it. On a CPU torch composes the norm of smaller operations, which
        keep the input and the normalised input, both in fp32, and the output.
        """
        if self.fp8:
            return self.width + 1
        if self.device == "cuda":
            return 2 * self.width
        return 12 if self.width == 4 else 10

    @property
    def more_norms(self) -> float:
        """Bytes per token that the norms after the blocks, and those of query and key heads, keep for backward.

        Nothing keeps the output of these norms for backward. The input of the heads' norms is part of the product that
        the values are a view of.
        """
        description, on_cpu = self.description, self.device == "cpu"
        kept = 0.0
        if description.post_norms:
            kept += 2 * ((8 if on_cpu else self.width) * self.streams + 4)
        if description.qk_layernorm:
            # In fp32: the normalised heads, and the queries once more, which the split of the product copies. In bf16:
            # the heads and the normalised heads, both in fp32.
            on_a_cpu = 8 * self.queries + (4 if self.width == 4 else 8) * self.keys
            kept += on_a_cpu if on_cpu else 0
            kept += 4 * (self.queries + self.keys) / self.channels
        return kept

    @property
    def products(self) -> int:
        """Feed-forward channels that a block keeps for backward, or holds at once: gate and up, what the activation
        makes of the gate, and the product. A fused activation keeps no more than its input and its output."""
        if not self.transformer_engine:
            return 4
        return 3 if self.description.activation == "silu" else 5

    @property
    def scores(self) -> float:
        """Attention scores that one block of model/attention.py holds at once; 0 where a kernel of torch or of
        Transformer Engine computes attention. Windows and soft-caps are ours on any layers."""
        description, longest = self.description, min(self.longest, self.tokens)
        capped, window = description.attention_softcap is not None, description.sliding_window
        if window is not None and window >= longest:
            window = None
        if not capped and window is None:
            return 0.0
        if capped and not all(description.windowed_layers):
            window = None  # the layers without a window have the larger blocks
        rows = attention_rows(longest, int(self.heads), window)
        return self.heads * rows * min(longest, rows + (window or longest))

    @property
    def layer_input(self) -> float:
        """Bytes per token of the input of a layer."""
        return self.streams * self.width

    def layer(self, recompute: str) -> float:
        """Bytes per token that one layer keeps for backward."""
        if recompute == "full":
            return self.layer_input
        norms = 2 * (self.norm * self.streams + 4) + self.more_norms
        statistics = 4 * self.heads
        if self.transformer_engine:
            attention = (2 * self.queries + 2 * self.keys) * self.width + (statistics if recompute == "none" else 0)
            # Linear layers keep their input in FP8. Attention keeps its result, the output matrix's input, in bf16 too.
            if self.fp8:
                return norms + attention + self.queries + 5 * self.feed_forward
            return norms + attention + self.products * self.feed_forward * self.width
        # Queries and keys before the rotation, with the values, which are a view of the same matrix product; queries
        # and keys after the rotation; the rotation's cosines and sines for both; and attention's joined result, which
        # is the input of the output matrix.
        attention = (3 * self.queries + 3 * self.keys + 4 * self.channels) * self.width
        if recompute == "none":  # attention also keeps the result of each segment and its log-sum-exps
            attention += self.queries * self.width + statistics
        return norms + attention + self.products * self.feed_forward * self.width

    @property
    def scan(self) -> int:
        """Bytes per logit while the head's forward works on a tile: the logits in fp32, and on a CPU what is rounded to
        16 bits before."""
        return 6 if self.width == 2 and self.device == "cpu" else 4

    def in_flight(self, stage: int) -> float:
        """Largest number of micro-batches that wait for backward at once, each counted over all layers of the rank."""
        behind = self.pipeline - stage - 1
        if self.virtual == 1:
            return min(self.micro_batches, behind + 1)
        chunks = 2 * behind + (self.virtual - 1) * self.pipeline + 1
        return min(self.micro_batches * self.virtual, chunks) / self.virtual


def _phases(rank: Sizes, stage: int, program: Program) -> Iterable[Phase]:
    """The phases of a program on one stage."""
    parameters = rank.parameters(stage)
    if program == "score":
        weights = {"frozen weights": rank.models * parameters * rank.width}
        scoring = {"batches": _batches(rank), "working memory": _forward_peak(rank, stage, rank.models)}
        yield _phase("weights", weights)
        yield _phase("scoring", weights | scoring)
        return
    shards = rank.data_parallel if rank.config.optimizer.use_distributed_optimizer else 1
    resting = {
        "policy weights": parameters * rank.width,
        "gradients": parameters * 4,
        # Adam's two moments and, for bf16 weights, a master copy in fp32.
        "optimizer state": parameters * (12 if rank.width == 2 else 8) / shards,
        "frozen weights": (rank.models - 1) * parameters * rank.width,
        # FP8 copies of the linear layers' weights: one as they are and one transposed.
        "FP8 weights": 2 * rank.layers * rank.layer_matrices if rank.fp8 else 0,
    }
    left_over = {"kept from the last pass": _left_over(rank, stage)}
    yield _phase("weights and optimizer", resting | left_over)
    moving = {
        "activations": rank.tokens * _kept(rank, stage),
        "batches": _batches(rank),
        "working memory": _training_peak(rank, stage),
    }
    yield _phase("forward and backward", resting | moving)
    updating = {"batches": _batches(rank), "working memory": _update(rank, stage, shards)}
    yield _phase("optimizer step", resting | left_over | updating)


def _phase(name: str, parts: dict[str, float]) -> Phase:
    return Phase(name, {part: round(amount) for part, amount in parts.items() if amount})


def _receiving_chunks(rank: Sizes, stage: int) -> int:
    """Number of chunks of the model on this stage that receive hidden states from another stage."""
    return rank.virtual - (1 if stage == 0 else 0) if rank.pipeline > 1 else 0


def _left_over(rank: Sizes, stage: int) -> float:
    """Bytes that Megatron keeps between steps: the hidden states that the last micro-batch received, their gradient,
    and the buffer in which sequence parallelism gathers."""
    received = _receiving_chunks(rank, stage) * rank.models * rank.layer_input
    return rank.tokens * (2 * received + rank.gathered * rank.width)


def _batches(rank: Sizes) -> float:
    """Bytes of tokens, positions, predictors, labels, pairs and sides of all micro-batches, and of cached scores."""
    names = rank.config.loss.scores
    scores = len(names) if rank.config.scores.cached else names.count("reward")
    # 8 bytes for each number but the scores.
    return rank.micro_batches * (16 * rank.tokens + (32 + 4 * scores) * rank.labelled)


def _kept(rank: Sizes, stage: int) -> float:
    """Bytes per token that a stage keeps for backward, for all micro-batches in flight."""
    recompute = rank.config.train.recompute
    kept = rank.layers * rank.layer(recompute)
    if recompute == "full":
        kept += 4 * rank.channels  # the rotary table, which all layers share
    # Hidden states of frozen models that came from another stage. The policy's are counted as its first layer's input.
    kept += _receiving_chunks(rank, stage) * (rank.models - 1) * rank.layer_input
    # Hidden states that were sent. Megatron frees them on a GPU, but for those of interleaved chunks before 0.18. These
    # are counted for every version: a plan is often made on another machine than the one that trains.
    if rank.pipeline > 1 and (rank.device == "cpu" or rank.virtual > 1):
        sending = rank.virtual - (1 if stage == rank.pipeline - 1 else 0)
        kept += sending * rank.models * rank.layer_input
    return kept * rank.in_flight(stage)


def _training_peak(rank: Sizes, stage: int) -> float:
    """Temporary bytes at the worst moment of a training pass, beside what is kept for backward."""
    tokens, width, hidden = rank.tokens, rank.width, rank.hidden
    recompute = rank.config.train.recompute
    # Backward computes again what one layer would have kept, and its output.
    again = rank.layer("none") if recompute == "full" else 0.0
    if recompute == "selective":
        again = rank.layer("none") - rank.layer("selective")
    gradient = tokens * rank.layer_input
    gather = tokens * rank.gathered * width
    last = stage == rank.pipeline - 1
    # Backward of a feed-forward block: of its output matrix, of its activation, and of its input matrix. Each holds the
    # gradients of what the block keeps, and of weights before they are added to Megatron's gradients. What the block
    # keeps is freed on the way.
    wide = tokens * rank.feed_forward * width
    kept_products = rank.products
    matrix = hidden * rank.feed_forward * width
    backward = max(
        gradient + gather + wide + matrix,
        gradient + 2 * wide,
        gradient + gather + tokens * hidden * width + (2 - kept_products) * wide + 2 * matrix,
    )
    moments = [tokens * again + backward + gather]
    if rank.scores:  # backward of attention, when what the feed-forward block kept is free again
        freed = tokens * (rank.products * rank.feed_forward * width + rank.norm * rank.streams)
        heads = tokens * (rank.queries * width + 8 * rank.keys)  # gradients of queries, keys and values
        # Probabilities, their gradient, which is in 16 bits first in bf16, and with a soft-cap its tanh.
        bytes_each = (8 if width == 4 else 10) + (4 if rank.description.attention_softcap is not None else 0)
        moments.append(tokens * again + gradient + heads + bytes_each * rank.scores - freed)
    kept = tokens * _kept(rank, stage)
    if stage == 0:  # the embedding's gradient, at the end of a micro-batch's backward
        moments.append(rank.padded_vocabulary * hidden * width + gradient - kept / rank.in_flight(stage))
    if rank.device == "cpu" and rank.config.optimizer.use_distributed_optimizer:
        moments.append(4 * rank.parameters(stage) - kept)  # gloo reduces a copy of the gradients after backward
    if rank.models > 1:
        policys = tokens * rank.norm * rank.streams if last else gradient
        others = (rank.models - 2) * gradient
        # What the previous pass received is still held while the last model runs.
        if rank.models > 2 and _receiving_chunks(rank, stage):
            others += 2 * rank.models * gradient
        moments.append(policys + _layers_forward(rank) + others)
    if last:
        moments += [gather + moment for moment in _head(rank)]
    # Interleaved chunks receive ahead in both directions, and what another chunk received in the previous pass is
    # still held.
    ahead = 4 * rank.models * gradient if rank.virtual > 1 else 0
    return max(moments) + ahead + gather  # Megatron keeps the buffer in which it gathers


def _forward_peak(rank: Sizes, stage: int, models: int) -> float:
    """Temporary bytes at the worst moment of a pass without backward."""
    outputs = (models - 1 + (models if rank.pipeline > 1 else 0)) * rank.tokens * rank.layer_input
    moments = [outputs + _layers_forward(rank)]
    if stage == rank.pipeline - 1:
        states = models * (rank.tokens * rank.layer_input + rank.labelled * rank.hidden * rank.width)
        moments.append(states + rank.tokens * rank.gathered * rank.width + _tile(rank) * rank.scan)
    return max(moments)


def _layers_forward(rank: Sizes) -> float:
    """Bytes of one layer's forward without a graph, in its feed-forward block, together with the hidden states."""
    feed_forward = rank.tokens * (rank.products * rank.feed_forward * rank.width + 5 * rank.layer_input)
    return max(feed_forward, 12 * rank.scores + 5 * rank.tokens * rank.layer_input)


def _tile(rank: Sizes) -> float:
    """Number of logits that the head holds at once."""
    return min(rank.labelled * rank.vocabulary, max(MIN_TILE_COLUMNS * rank.labelled, TILE_ELEMENTS[rank.device]))


def _head(rank: Sizes) -> list[float]:
    """Bytes of the final norm and the head at each of their worst moments, in forward and in backward."""
    states = rank.labelled * rank.hidden * rank.width  # hidden states of labelled tokens
    tile = _tile(rank)
    whole = tile == rank.labelled * rank.vocabulary  # then forward keeps the tile for backward
    narrow = rank.width == 2
    norms = rank.models * rank.tokens * rank.layer_input + rank.tokens * (rank.norm - rank.width) * rank.streams
    # With a soft-cap, backward also holds the cap's slope, and forward keeps nothing.
    slope = 4 * tile if rank.description.logit_softcap is not None else 0
    whole = whole and not slope
    divergence = "divergence" in rank.config.loss.method.reads
    forward = norms + rank.models * states + tile * rank.scan
    gradient = rank.labelled * rank.hidden * 4
    # A product before it is added to a gradient: in fp32 on a GPU, which keeps the sums; fp32 ones are added in place.
    wide = 4 if rank.device == "cuda" else rank.width
    product = max(rank.labelled, tile / rank.labelled) * rank.hidden * wide if narrow else 0
    backward = norms + 2 * states + gradient + slope + (max(6 * tile, 2 * tile + product) if narrow else 4 * tile)
    if not divergence:
        return [forward, backward]
    kept = 4 * tile if whole else 0
    both = norms + 2 * states + kept
    return [
        forward,
        both + tile * (4 + rank.scan),
        both + gradient + slope + tile * (10 if narrow else 8) + product,
    ]


def _update(rank: Sizes, stage: int, shards: int) -> float:
    """Temporary bytes of Adam's update."""
    if rank.transformer_engine:
        return 0.0
    if rank.device == "cuda":  # torch's AdamW takes the root of all second moments at once
        return 4 * rank.parameters(stage) / shards
    return 2 * 4 * min(rank.largest_matrix, rank.parameters(stage) / shards)
