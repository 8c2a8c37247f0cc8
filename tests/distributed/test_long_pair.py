"""A pair that is too long for one rank is trained on two context-parallel ranks, in the memory that is planned."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tests.distributed.test_memory import SMALL, case
from tests.support.memory import pairs_of
from tests.support.program import run_ranks
from tgdpo_megatron.config import Config
from tgdpo_megatron.data.batch import make_batch
from tgdpo_megatron.planning.load import Load
from tgdpo_megatron.planning.memory import plan

pytestmark = pytest.mark.long

TOKENS, PROMPT, LENGTH = 32768, 30000, 31385
"""What the model reads of the pair, and its shared prompt and each of its sequences: 2 (LENGTH - 1) - PROMPT tokens."""

LIMIT = 256 << 20
"""Bytes that a rank may use, by assumption."""

MODEL = dataclasses.replace(
    SMALL,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=256,
    num_attention_heads=2,
    num_query_groups=1,
    max_position_embeddings=TOKENS,
)


def test_a_pair_of_32768_tokens_that_does_not_fit_one_rank_trains_on_two() -> None:
    """Even with full recomputation it does not fit one rank. Both ranks stay within the limit, and within 5 % of their
    plan, and the loss of the pair falls."""
    of = case(
        shape=MODEL, length=LENGTH, prompt=PROMPT, pairs=1, shared=True, recompute="full", distributed_optimizer=False
    )
    pairs = pairs_of([LENGTH], PROMPT, MODEL.vocab_size, shared=True)
    whole = Load.of(make_batch(pairs, [0], shared_prompts=True))
    assert whole.tokens == TOKENS
    config = Config.model_validate(of["settings"])
    alone = plan(config, MODEL, world_size=1, device="cpu", load=whole, micro_batches=1)
    assert alone.bytes > LIMIT

    of["settings"] |= {"parallel": {"context_parallel_size": 2}, "optimizer": {"lr": 0.01}}
    config = Config.model_validate(of["settings"])
    (ranks,) = run_ranks("tests.support.memory", "measure", 2, cases=[of], timeout_minutes=4)
    for measured in ranks:
        planned = plan(config, MODEL, world_size=2, device="cpu", load=Load(**measured["load"]), micro_batches=1).phase(
            "forward and backward"
        )
        assert measured["forward and backward"] <= LIMIT
        assert planned.bytes == pytest.approx(measured["forward and backward"], rel=0.05), planned
        before, after = measured["losses"]
        assert math.isfinite(before) and after < before
