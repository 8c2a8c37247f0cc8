"""The sizes of one rank's tensors: its weights, and what one layer keeps for backward.

Numbers per token are per token of the rank. Under context parallelism a rank holds a share of a micro-batch's tokens.
Feed-forward, query and key channels and the vocabulary are the share of one tensor-parallel rank.
"""

from __future__ import annotations

from typing import Literal

from tgdpo_megatron.config import Config, check_layout
from tgdpo_megatron.config.constants import (
    MASK_MULTIPLE,
    MASKED_ROWS,
    SCORED_AT_ONCE,
    VOCAB_MULTIPLE,
    attention_rows,
    round_up,
)
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import layer_parameters
from tgdpo_megatron.planning.load import Load, Program, largest_loads, longest_pair, most_tokens

Device = Literal["cpu", "cuda"]


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
        load: Load | None = None,
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

        self.load = load if load is not None else largest_loads(config, description, program)[0]
        self.context = parallel.context_parallel_size
        self.tokens = self.load.tokens
        self.predicted = max(1, self.load.predicted)
        self.copied_keys = self.load.key_rows / self.tokens
        """Keys that attention copies per token, for blocks that have more keys than queries."""
        pairs = SCORED_AT_ONCE if program == "score" else -(-config.train.global_batch_size // self.data_parallel)
        at_once = max(1, most_tokens(config, description) // longest_pair(config, description))
        self.micro_batches = micro_batches if micro_batches is not None else -(-pairs // at_once)

        self.hidden = description.hidden_size
        self.channels = description.kv_channels
        self.heads = description.num_attention_heads / tensor
        self.query_channels = self.heads * self.channels
        self.key_channels = description.num_query_groups / tensor * self.channels
        self.feed_forward = description.ffn_hidden_size / tensor
        self.layers = description.num_layers // self.pipeline
        multiple = VOCAB_MULTIPLE * tensor
        self.padded_vocabulary = round_up(description.vocab_size, multiple) / tensor
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
        return self.hidden * max(
            2 * self.feed_forward, self.query_channels + 2 * self.key_channels, self.padded_vocabulary
        )

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
            on_a_cpu = 8 * self.query_channels + (4 if self.width == 4 else 8) * self.key_channels
            kept += on_a_cpu if on_cpu else 0
            kept += 4 * (self.query_channels + self.key_channels) / self.channels
        return kept

    @property
    def products(self) -> int:
        """Feed-forward channels that a block keeps for backward, or holds at once: gate and up, what the activation
        makes of the gate, and the product. A fused activation keeps no more than its input and its output."""
        if not self.transformer_engine:
            return 4
        return 3 if self.description.activation == "silu" else 5

    @property
    def attention_scores(self) -> float:
        """Attention scores that one strip of queries of model/attention.py holds at once; 0 where a kernel of torch or
        of Transformer Engine computes attention.

        Windows and soft-caps are computed in strips on any layers, and so are blocks with more keys than queries in
        fp32 on a GPU. In 16 bits a kernel is assumed for them.
        """
        description, keys = self.description, self.load.most_keys
        capped, window = description.attention_softcap is not None, description.sliding_window
        if window is not None and window >= keys:
            window = None
        no_kernel = self.device == "cuda" and self.width == 4 and self.load.key_rows > 0
        if not capped and window is None and not no_kernel:
            return 0.0
        if (capped or no_kernel) and not all(description.windowed_layers):
            window = None  # the layers without a window have the larger strips
        rows = min(attention_rows(keys, int(self.heads), window), self.load.most_queries)
        return self.heads * rows * min(keys, rows + (window or keys))

    @property
    def mask(self) -> float:
        """Bytes of the mask with which torch's attention computes blocks that have more keys than queries. It is kept.
        A kernel for a GPU needs none."""
        description, keys = self.description, self.load.most_keys
        window = description.sliding_window
        all_windowed = window is not None and window < keys and all(description.windowed_layers)
        if self.device == "cuda" or not self.load.key_rows or description.attention_softcap is not None or all_windowed:
            return 0.0
        return self.width * MASKED_ROWS * (round_up(keys, MASK_MULTIPLE) + MASKED_ROWS)

    @property
    def copied_bytes(self) -> float:
        """Bytes per token of the keys and values that attention copies."""
        return 2 * self.key_channels * self.width * self.copied_keys

    @property
    def replaced_by_copies(self) -> float:
        """Bytes per token of the keys and values that nothing needs for backward once attention has copied them.

        On local layers the values are a view of the product of queries, keys and values. Norms of the heads keep the
        whole product all the same, but for those in 16 bits on a CPU, which keep fp32 copies.
        """
        if not self.copied_bytes:
            return 0.0
        rotated = self.key_channels
        if self.description.qk_layernorm and (self.device == "cuda" or self.width == 4):
            return rotated * self.width
        product = self.key_channels if self.transformer_engine else self.query_channels + 2 * self.key_channels
        return (rotated + product) * self.width

    @property
    def core_attention(self) -> float:
        """Bytes per token that core attention keeps for backward beside its inputs: log-sum-exps, the keys and values
        that it copies, and on local layers the result of each block, which is then joined."""
        return 4 * self.heads + self.copied_bytes + (0 if self.transformer_engine else self.query_channels * self.width)

    @property
    def layer_input(self) -> float:
        """Bytes per token of the input of a layer."""
        return self.streams * self.width

    def layer(self, recompute: str) -> float:
        """Bytes per token that one layer keeps for backward."""
        if recompute == "full":
            return self.layer_input
        norms = 2 * (self.norm * self.streams + 4) + self.more_norms
        # Selective recomputation computes core attention again, from queries, keys and values.
        core = self.core_attention - self.replaced_by_copies if recompute == "none" else 0.0
        if self.transformer_engine:
            attention = (2 * self.query_channels + 2 * self.key_channels) * self.width + core
            # Linear layers keep their input in FP8. Attention keeps its result, the output matrix's input, in bf16 too.
            if self.fp8:
                return norms + attention + self.query_channels + 5 * self.feed_forward
            return norms + attention + self.products * self.feed_forward * self.width
        # Queries and keys before the rotation, with the values, which are a view of the same matrix product; queries
        # and keys after the rotation; the rotation's cosines and sines for both; and attention's joined result, which
        # is the input of the output matrix.
        attention = (3 * self.query_channels + 3 * self.key_channels + 4 * self.channels) * self.width + core
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
