"""What a rank holds beside its weights: for backward, between steps, and for a moment at the worst moments."""

from __future__ import annotations

from tgdpo_megatron.config.constants import MASKED_ROWS, MIN_TILE_COLUMNS, TILE_ELEMENTS
from tgdpo_megatron.planning.sizes import Sizes


def _receiving_chunks(rank: Sizes, stage: int) -> int:
    """Number of chunks of the model on this stage that receive hidden states from another stage."""
    return rank.virtual - (1 if stage == 0 else 0) if rank.pipeline > 1 else 0


def left_over(rank: Sizes, stage: int) -> float:
    """Bytes that Megatron keeps between steps: the hidden states that the last micro-batch received, their gradient,
    and the buffer in which sequence parallelism gathers."""
    received = _receiving_chunks(rank, stage) * rank.models * rank.layer_input
    return rank.tokens * (2 * received + rank.gathered * rank.width)


def batches(rank: Sizes) -> float:
    """Bytes of tokens, positions, rows of keys, predictors, labels, pairs and sides of all micro-batches, and of
    cached scores."""
    names = rank.config.loss.scores
    scores = len(names) if rank.config.scores.cached else names.count("reward")
    load = rank.load
    each = 8 * (2 * rank.tokens + load.key_rows + 2 * load.predicted + 2 * load.labelled) + 4 * scores * load.labelled
    if rank.context > 1:
        each += 8 * load.labelled  # where the labels of all context-parallel ranks are
    return rank.micro_batches * each


def kept_per_token(rank: Sizes, stage: int) -> float:
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


def training_peak(rank: Sizes, stage: int) -> float:
    """Temporary bytes at the worst moment of a training pass, beside what is kept for backward."""
    tokens, width, hidden = rank.tokens, rank.width, rank.hidden
    recompute = rank.config.train.recompute
    # Backward computes again what one layer would have kept, and its output.
    again = rank.layer("none") if recompute == "full" else 0.0
    if recompute == "selective":
        again = rank.core_attention
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
    # What the feed-forward block kept is free again in backward of attention.
    freed = tokens * (rank.products * rank.feed_forward * width + rank.norm * rank.streams)
    if rank.attention_scores:
        heads = tokens * (rank.query_channels * width + 8 * rank.key_channels)  # gradients of queries, keys and values
        # Probabilities, their gradient, which is in 16 bits first in bf16, and with a soft-cap its tanh.
        bytes_each = (8 if width == 4 else 10) + (4 if rank.description.attention_softcap is not None else 0)
        moments.append(tokens * again + gradient + heads + bytes_each * rank.attention_scores - freed)
    if rank.copied_bytes:
        moments += [tokens * again + moment - freed for moment in _backward_of_copies(rank)]
    kept = tokens * kept_per_token(rank, stage)
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


def _backward_of_copies(rank: Sizes) -> list[float]:
    """Bytes of the worst moments of core attention's backward where it has copied keys and values, less what it frees.

    At first the blocks' gradients are computed one after another, and those of a strip of a block are padded to the
    block. When the last block is done, what attention kept is free, and the blocks' gradients are joined: of the keys
    first and then of the values, or of both together where ranks gathered them together.
    """
    tokens, width = rank.tokens, rank.width
    # With full recomputation the layer's output is there too, as long as the gradient.
    states = tokens * rank.layer_input * (2 if rank.config.train.recompute == "full" else 1)
    heads, copies = tokens * rank.query_channels * width, tokens * rank.copied_bytes
    in_strips = rank.load.most_queries > MASKED_ROWS
    block = 2 * rank.key_channels * width * rank.load.most_keys if in_strips else 0
    done = tokens * rank.core_attention + 2 * heads  # with the queries and the joined result
    joined = copies if rank.context > 1 else copies / 2
    return [states + 2 * heads + copies + block, states + heads + copies + joined - done]


def forward_peak(rank: Sizes, stage: int, models: int) -> float:
    """Temporary bytes at the worst moment of a pass without backward."""
    outputs = (models - 1 + (models if rank.pipeline > 1 else 0)) * rank.tokens * rank.layer_input
    moments = [outputs + _layers_forward(rank)]
    if stage == rank.pipeline - 1:
        states = models * (rank.tokens * rank.layer_input + rank.predicted * rank.hidden * rank.width)
        moments.append(states + rank.tokens * rank.gathered * rank.width + _tile(rank) * rank.scan)
    return max(moments)


def _layers_forward(rank: Sizes) -> float:
    """Bytes of one layer's forward without a graph, in its feed-forward block or in attention, together with the hidden
    states."""
    feed_forward = rank.tokens * (rank.products * rank.feed_forward * rank.width + 5 * rank.layer_input)
    moments = [feed_forward, 12 * rank.attention_scores + 5 * rank.tokens * rank.layer_input]
    if rank.copied_bytes:
        # Queries, keys and values before and after the rotation, its cosines and sines, and attention's result as it is
        # joined from strips to blocks and from blocks to the whole.
        heads = (5 * rank.query_channels + 3 * rank.key_channels + 4 * rank.channels) * rank.width
        moments.append(rank.tokens * (4 * rank.layer_input + heads + rank.copied_bytes))
    return max(moments)


def _tile(rank: Sizes) -> float:
    """Number of logits that the head holds at once."""
    return min(rank.predicted * rank.vocabulary, max(MIN_TILE_COLUMNS * rank.predicted, TILE_ELEMENTS[rank.device]))


def _head(rank: Sizes) -> list[float]:
    """Bytes of the final norm and the head at each of their worst moments, in forward and in backward."""
    states = rank.predicted * rank.hidden * rank.width  # hidden states of labelled tokens
    tile = _tile(rank)
    whole = tile == rank.predicted * rank.vocabulary  # then forward keeps the tile for backward
    narrow = rank.width == 2
    norms = rank.models * rank.tokens * rank.layer_input + rank.tokens * (rank.norm - rank.width) * rank.streams
    # With a soft-cap, backward also holds the cap's slope, and forward keeps nothing.
    slope = 4 * tile if rank.description.logit_softcap is not None else 0
    whole = whole and not slope
    divergence = "divergence" in rank.config.loss.method.reads
    forward = norms + rank.models * states + tile * rank.scan
    gradient = rank.predicted * rank.hidden * 4
    # A product before it is added to a gradient: in fp32 on a GPU, which keeps the sums; fp32 ones are added in place.
    wide = 4 if rank.device == "cuda" else rank.width
    product = max(rank.predicted, tile / rank.predicted) * rank.hidden * wide if narrow else 0
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


def update(rank: Sizes, stage: int, shards: int) -> float:
    """Temporary bytes of Adam's update."""
    if rank.transformer_engine:
        return 0.0
    if rank.device == "cuda":  # torch's AdamW takes the root of all second moments at once
        return 4 * rank.parameters(stage) / shards
    return 2 * 4 * min(rank.largest_matrix, rank.parameters(stage) / shards)
