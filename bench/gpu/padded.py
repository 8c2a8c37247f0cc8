"""The authors' computation of a TGDPO step on the same GPU, weights and pairs: three live HuggingFace models in bf16,
micro-batches of 4 pairs padded to their longest sequence, full fp32 log-softmax, torch's fused AdamW.

    python -m bench.gpu.padded

8 layers of Llama-3-8B with its vocabulary, so that both fit the card one after the other. HuggingFace's weights,
gradients and Adam moments are all bf16, less memory and traffic than ours. Attention: torch's
scaled_dot_product_attention with the padding's mask, what transformers takes by default. Where 4 pairs do not fit,
their micro-batch is halved, and the row says so. Losses of both are compared first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu import device
from bench.gpu.model import LAYERS, PACKED, SIZES, InPlace, describe, make_pairs, tokens_of
from bench.ours import LEARNING_RATE, LOSS, ROLES
from bench.process import one_rank
from bench.rows import Row, paired
from bench.theirs import Theirs
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.model.families import family_of

STEPS = 3
"""The first warms up."""
SAME_LOSS = 0.05
"""A bf16 token log-prob of either side is off by about 2^-8 of its logits: 0.01 nats, 0.2 over a response of 400
tokens; beta takes a tenth, and the mean over the pairs a part of that."""


def measure() -> Iterator[Row]:
    with one_rank():
        data, steps = make_pairs(STEPS)
        model = describe(SIZES.few_layers)
        theirs = Theirs(
            _models(), beta=LOSS.beta, alpha=LOSS.alpha, beta_r=LOSS.reward_options["beta_r"], lr=LEARNING_RATE
        )
        theirs.optimizer = torch.optim.AdamW(
            theirs.policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=not device.REHEARSAL
        )
        with _torchs_choice_of_attention():
            padded, micro_batch = _their_seconds(theirs, data, steps)
            theirs.optimizer.zero_grad()
            del theirs.optimizer
            device.free()
            expected = _their_loss(theirs, data, steps[0], micro_batch)
        models = dict(zip(ROLES, (theirs.policy, *theirs.frozen), strict=True))
        del theirs
        ours = InPlace(data, model)
        _copy_weights(models, ours)
        del models
        device.free()
        for pairs in steps:
            ours.cache_scores(pairs)
        loss = ours.loss(steps[0])
        yield Row(
            f"loss, |HuggingFace − ours|, {LAYERS}",
            abs(loss - expected),
            target=SAME_LOSS,
            limit="bf16 rounding",
            note=f"{expected:.4f} and {loss:.4f}",
        )
        seconds = [device.timed(ours.step, pairs)[0] for pairs in steps]
        read, apart = (
            sum(tokens_of(data, pairs, shared_prompts=shared) for pairs in steps[1:]) for shared in (True, False)
        )
        yield paired(
            f"steps per second, ours cached and packed / HuggingFace live and padded, {LAYERS}",
            padded[1:],
            seconds[1:],
            target=3.0,
            at_most=False,
            limit=f"10 / 6 of the products, padding {_padding(data, steps[1:], micro_batch):.2f}, prompts read twice "
            f"{apart / read:.2f}",
            note=f"{read / sum(seconds[1:]):.0f} / {apart / sum(padded[1:]):.0f} tokens/s, a shared prompt once / "
            f"twice, theirs in micro-batches of {micro_batch} pairs; {model.num_layers} layers of 8B, {PACKED}",
        )


@contextlib.contextmanager
def _torchs_choice_of_attention() -> Iterator[None]:
    """Every kernel torch has, also one that our side may have switched off: padded shapes come again and again."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _models() -> list[Any]:
    """Policy, reference and guidance: random, all different, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = describe(SIZES.few_layers)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device.HERE):
        policy = LlamaForCausalLM(config)
    rotary = policy.model.rotary_emb
    frequencies = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    policy.bfloat16()
    for name, buffer in frequencies.items():
        setattr(rotary, name, buffer)  # fp32, as in a model that is loaded; in bf16 positions would blur
    models = [policy, *(copy.deepcopy(policy) for _ in ROLES[1:])]
    for model in models[1:]:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.02)
    return models


def _their_seconds(theirs: Theirs, data: PreparedPairs, steps: Sequence[list[int]]) -> tuple[list[float], int]:
    """Seconds of each step, and the pairs of a micro-batch that fitted."""
    for micro_batch in (4, 2, 1):
        step = partial(theirs.step, data, micro_batch=micro_batch)
        try:
            return [device.timed(step, pairs)[0] for pairs in steps], micro_batch
        except torch.OutOfMemoryError:
            theirs.optimizer.zero_grad()
        device.free()
    raise SystemExit("one pair does not fit the card")


def _their_loss(theirs: Theirs, data: PreparedPairs, pairs: list[int], micro_batch: int) -> float:
    with torch.no_grad():
        losses = [theirs.loss(data, pairs[first : first + micro_batch]) for first in range(0, len(pairs), micro_batch)]
    return float(torch.cat(losses).mean())


def _padding(data: PreparedPairs, steps: Sequence[list[int]], micro_batch: int) -> float:
    """Tokens that a padded step goes through, for each real one."""
    padded = real = 0
    for pairs in steps:
        for first in range(0, len(pairs), micro_batch):
            lengths = [len(data.sequence(pair, side)) for pair in pairs[first : first + micro_batch] for side in (0, 1)]
            padded, real = padded + len(lengths) * -(-max(lengths) // 8) * 8, real + sum(lengths)
    return padded / real


@torch.no_grad()
def _copy_weights(models: dict[str, Any], ours: InPlace) -> None:
    """Give our models theirs' weights, the policy's fp32 copies in the optimizer too."""
    from tgdpo_megatron.checkpoint.fingerprint import sharded_tensors
    from tgdpo_megatron.checkpoint.state import sharded_model_state

    for role, chunks in {"policy": ours.engine.chunks, **ours.frozen}.items():
        weights = models[role].state_dict()
        whole = {tensor.key: tensor for tensor in family_of(ours.description).tensors(ours.description)}
        for shard in sharded_tensors(sharded_model_state(chunks)):
            tensor = whole[shard.key]
            # A gate and its up projection are two shards of one tensor.
            wanted = tensor.join([weights[name] for name in tensor.names])
            start = shard.global_offset[0]
            shard.data.copy_(wanted[start : start + len(shard.data)])
    ours.engine.optimizer.reload_model_params()


if __name__ == "__main__":
    device.program(__doc__, measure)
