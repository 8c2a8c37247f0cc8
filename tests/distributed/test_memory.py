"""The planner's bytes are those of the tensors that are there: in real steps, on real ranks, phase by phase."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.support.program import run_ranks
from tgdpo_megatron.config import Config
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.planning.load import Load
from tgdpo_megatron.planning.memory import Plan, plan

SMALL = ModelDescription(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=1000,
    max_position_embeddings=2048,
    layernorm_epsilon=1e-5,
    tie_word_embeddings=False,
    rotary_base=1e4,
    rope_scaling_factor=None,
)
WIDE = dataclasses.replace(SMALL, num_layers=2, hidden_size=384, ffn_hidden_size=1280, num_attention_heads=12)
MANY_KEYS = dataclasses.replace(SMALL, num_layers=2, num_query_groups=8, ffn_hidden_size=128)
TIED = dataclasses.replace(SMALL, tie_word_embeddings=True, vocab_size=3000)

QWEN2 = dataclasses.replace(SMALL, family="qwen2", attention_bias=True)
QWEN3 = dataclasses.replace(SMALL, family="qwen3", qk_layernorm=True, kv_channels=48)
MISTRAL = dataclasses.replace(SMALL, family="mistral", sliding_window=64, windowed_layers=(True,) * 4)
GEMMA2 = dataclasses.replace(
    SMALL,
    family="gemma2",
    kv_channels=48,
    sliding_window=64,
    windowed_layers=(True, False) * 2,
    attention_softcap=50.0,
    logit_softcap=30.0,
    embedding_scale=16.0,
    zero_centered_norms=True,
    post_norms=True,
    activation="gelu_tanh",
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    family="gemma3_text",
    attention_softcap=None,
    logit_softcap=None,
    qk_layernorm=True,
    windowed_layers=(True, True, True, False),
    window_rotary_base=1e4,
)

TENSOR = {"tensor_model_parallel_size": 2}
SEQUENCE = TENSOR | {"sequence_parallel": True}
RECOMPUTE = ("none", "selective", "full")
PIPELINE = {"pipeline_model_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
INTERLEAVED = PIPELINE | {"virtual_pipeline_model_parallel_size": 2}


def case(
    precision: str = "fp32",
    *,
    shape: ModelDescription = SMALL,
    length: int = 201,
    pairs: int = 4,
    loss: str = "simpo",
    recompute: str = "none",
    distributed_optimizer: bool = True,
    parallel: dict[str, Any] | None = None,
    prompt: int = 20,
    shared: bool = False,
    program: str = "train",
) -> dict[str, Any]:
    """One pair at once, whose prompts are the same or differ; simpo has no frozen model, tgdpo two, live."""
    settings = {
        "parallel": parallel or {},
        "loss": {"type": loss},
        "optimizer": {"use_distributed_optimizer": distributed_optimizer},
        "train": {"precision": precision, "recompute": recompute, "global_batch_size": pairs},
        "data": {"max_length": length},
    }
    lengths = [length] * pairs
    shape_of_it = dataclasses.asdict(shape)
    pairs_of = {"lengths": lengths, "prompt": prompt, "shared": shared}
    return {"settings": settings, "shape": shape_of_it, "program": program, **pairs_of}


def planned(of: dict[str, Any], world_size: int, stage: int, load: dict[str, int]) -> Plan:
    config = Config.model_validate(of["settings"])
    return plan(
        config,
        ModelDescription(**of["shape"]),
        world_size=world_size,
        program=of["program"],
        device="cpu",
        load=Load(**load),
        micro_batches=len(of["lengths"]) * config.parallel.model_parallel_size // world_size,
        stage=stage,
    )


CASES = {
    1: [
        case(),
        case("bf16"),
        case("bf16", distributed_optimizer=False),
        case(shape=TIED),
        case("bf16", shape=WIDE, length=601, pairs=1, prompt=590),
        case(length=601, pairs=1, recompute="selective"),
        case("bf16", length=601, pairs=1, recompute="full"),
        case(length=601, pairs=1, loss="tgdpo"),
        case(length=601, pairs=1, loss="tdpo2"),
        case("bf16", length=51, pairs=1),
        case("bf16", length=601, pairs=1, loss="tgdpo", program="score"),
        *(case(shape=shape) for shape in (MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)),
        *(case("bf16", shape=shape, pairs=1, length=601) for shape in (GEMMA2, GEMMA3)),
        case(shape=GEMMA2, loss="tdpo2", recompute="selective"),
        case("bf16", shape=GEMMA2, loss="tgdpo", recompute="full"),
        *(case(shared=True, prompt=120, recompute=recompute) for recompute in RECOMPUTE),
        *(case("bf16", shared=True, prompt=500, length=601, pairs=1, recompute=recompute) for recompute in RECOMPUTE),
        case(shared=True, prompt=120, loss="tgdpo"),
        case(shared=True, prompt=500, length=601, pairs=1, loss="tgdpo", program="score"),
        *(case(shape=shape, shared=True, prompt=150) for shape in (MANY_KEYS, MISTRAL, QWEN3, GEMMA2, GEMMA3)),
    ],
    2: [
        case(parallel=TENSOR),
        case("bf16", parallel=SEQUENCE),
        case(parallel=SEQUENCE, loss="tgdpo"),
        case(parallel=SEQUENCE, recompute="full"),
        case(parallel=PIPELINE),
        case("bf16", parallel=PIPELINE, shape=TIED),
        case(parallel=PIPELINE, loss="tgdpo"),
        case(parallel=PIPELINE, recompute="full"),
        case(parallel=INTERLEAVED),
        case(parallel=INTERLEAVED, pairs=2),
        case(),
        case("bf16"),
        case("bf16", distributed_optimizer=False),
        case(loss="tgdpo", program="score", parallel=PIPELINE),
        case(loss="tgdpo", program="score", parallel=SEQUENCE),
        case(shape=QWEN3, parallel=SEQUENCE),
        case(shape=GEMMA3, parallel=PIPELINE, loss="tgdpo"),
        *(
            case(precision, parallel=CONTEXT, length=601, pairs=1, shared=shared, prompt=300, recompute=recompute)
            for precision in ("fp32", "bf16")
            for recompute in RECOMPUTE
            for shared in (False, True)
        ),
        case(parallel=CONTEXT, shared=True, prompt=120, loss="tgdpo"),
        case(parallel=CONTEXT, shared=True, prompt=500, length=601, pairs=1, loss="tgdpo", program="score"),
        case(parallel=CONTEXT, shape=MANY_KEYS, shared=True, prompt=950, length=1001, pairs=1),
        case(parallel=CONTEXT, shape=MANY_KEYS, length=1001, pairs=1, recompute="full"),
        *(case(parallel=CONTEXT, shape=shape, shared=True, prompt=150) for shape in (MISTRAL, QWEN3, GEMMA2, GEMMA3)),
        case(parallel=PIPELINE, shared=True, prompt=150, loss="tgdpo"),
        case("bf16", parallel=SEQUENCE, shared=True, prompt=150),
    ],
    4: [
        case(parallel=SEQUENCE | PIPELINE, loss="tgdpo"),
        case("bf16", parallel=SEQUENCE),
        case("bf16", parallel=PIPELINE, distributed_optimizer=False),
        case(parallel=CONTEXT | SEQUENCE, shared=True, prompt=120),
        case("bf16", parallel=CONTEXT | SEQUENCE, length=601, pairs=1, recompute="selective"),
        case(parallel=CONTEXT | PIPELINE, shared=True, prompt=120, loss="tgdpo"),
        case(parallel=CONTEXT | PIPELINE, recompute="full"),
        case(parallel={"context_parallel_size": 4}, shared=True, prompt=300, length=601, pairs=1),
        case(parallel=CONTEXT, shared=True, prompt=120, pairs=2),
    ],
}


@pytest.fixture(scope="module", params=CASES)
def measured_on(request: pytest.FixtureRequest) -> tuple[int, list[list[dict[str, Any]]]]:
    """A number of ranks, and what each of them counted in each case."""
    ranks: int = request.param
    return ranks, run_ranks("tests.support.memory", "measure", ranks, cases=CASES[ranks])


def test_every_phase_needs_what_is_planned_within_five_percent(measured_on: Any) -> None:
    world_size, counted = measured_on
    for of, ranks in zip(CASES[world_size], counted, strict=True):
        stages = Config.model_validate(of["settings"]).parallel.pipeline_model_parallel_size
        for rank, measured in enumerate(ranks):
            plan_of_it = planned(of, world_size, rank * stages // world_size, measured["load"])
            for phase in plan_of_it.phases:
                assert phase.bytes == pytest.approx(measured[phase.name], rel=0.05), (of, rank, phase)


def test_weights_gradients_and_optimizer_state_are_the_tensors_of_the_engine(measured_on: Any) -> None:
    """Weights and gradients to the byte, the vocabulary's padding included; of optimizer state that is shared out, the
    shares are uneven by what Megatron pads, at most 128 numbers."""
    world_size, counted = measured_on
    for of, ranks in zip(CASES[world_size], counted, strict=True):
        if of["program"] == "score":
            continue
        stages = Config.model_validate(of["settings"]).parallel.pipeline_model_parallel_size
        for rank, measured in enumerate(ranks):
            parts = (
                planned(of, world_size, rank * stages // world_size, measured["load"])
                .phase("weights and optimizer")
                .parts
            )
            for name in ("policy weights", "gradients", "frozen weights"):
                assert parts.get(name, 0) == measured[name], (of, rank, name)
            assert abs(parts["optimizer state"] - measured["optimizer state"]) <= 12 * 128, (of, rank)


def test_activations_are_what_autograd_keeps() -> None:
    """Of pairs whose prompts differ, of pairs that share them, and on one of two context-parallel ranks."""
    cases = [
        case(precision, shape=shape, length=length, pairs=1, recompute=recompute, shared=shared, prompt=140)
        for precision in ("fp32", "bf16")
        for shape, length in ((SMALL, 301), (WIDE, 151))
        for recompute in RECOMPUTE
        for shared in (False, True)
    ]
    cases += [case(precision, shape=QWEN3, shared=True, prompt=140, pairs=1) for precision in ("fp32", "bf16")]
    split = [
        case(precision, parallel=CONTEXT, pairs=1, recompute=recompute, shared=True, prompt=140)
        for precision in ("fp32", "bf16")
        for recompute in RECOMPUTE
    ]
    for world_size, those in ((1, cases), (2, split)):
        counted = run_ranks("tests.support.memory", "kept_by_layers", world_size, cases=those)
        for of, (measured, load) in zip(those, counted, strict=True):
            activations = planned(of, world_size, 0, load).phase("forward and backward").parts["activations"]
            assert activations == pytest.approx(measured, rel=0.01), of
