"""The speed of a run: operations against counts made another way, rates and shares against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.pairs import ultrafeedback_like
from bench.speed.flops import counted_flops
from tgdpo_megatron.config import Config, LossConfig, ScoresConfig, TrainConfig
from tgdpo_megatron.data.prepare import PreparedPairs
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.flops import TRAINING, forward_operations
from tgdpo_megatron.platform.clock import ACTIVITIES, FROZEN, OTHER, POLICY, SAVING, WAITING, Spent
from tgdpo_megatron.platform.peaks import peak_of
from tgdpo_megatron.report.pace import Pace, total_shares, where_time_went

MODEL = ModelDescription(3, 64, 160, 4, 2, 16, 512, 256, 1e-5, False, 10000.0, None)


def test_operations_of_a_forward_pass_are_those_that_torch_counts() -> None:
    """Every token that the model reads is labelled, as HuggingFace's model computes logits for all of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="sdpa",
        )
    )
    with torch.no_grad():
        forward = sum(counted_flops(lambda n=n: hf(input_ids=torch.arange(n)[None], use_cache=False)) for n in (19, 30))
    # torch's attention for CPUs computes the whole square of so few tokens; half of it is needed, in two products.
    needless = sum(MODEL.num_layers * 2 * 2 * 4 * 16 * n**2 / 2 for n in (19, 30))
    assert forward_operations(MODEL, np.array([19, 30]), 49) == forward - needless


@pytest.mark.parametrize("window", [None, 4, 8, 100])
def test_operations_of_a_response_after_a_shared_prompt_are_those_of_its_own_queries(window: int | None) -> None:
    """Counted from the mask: 12 queries after 7 keys, a query's own key and the far end of a window counting half."""
    windowed = {} if window is None else {"sliding_window": window, "windowed_layers": (True,) * 3}
    model = replace(MODEL, **windowed)
    apart = np.arange(7, 19)[:, None] - np.arange(19)
    seen = float(((apart > 0) & (apart < (window or 19))).sum()) + len(apart) / 2
    if window is not None:
        seen += (apart == window).sum() / 2
    matrices = 2 * 3 * 12 * (2 * 64 * (64 + 32) + 3 * 64 * 160)
    assert forward_operations(model, np.array([12]), 0, np.array([7])) == matrices + 3 * 2 * 2 * 64 * seen


@pytest.mark.parametrize("window", [1, 7, 19, 25, 100])
def test_a_query_of_a_windowed_layer_sees_its_window_alone(window: int) -> None:
    """One layer of three is windowed. Counted from the mask; the token itself counts half, as in half of a square."""
    lengths = np.array([19, 30])
    mixed = replace(MODEL, sliding_window=window, windowed_layers=(False, True, False))
    whole = windowed = 0.0
    for length in lengths:
        apart = np.arange(length)[:, None] - np.arange(length)
        whole += (apart > 0).sum() + length / 2
        # A window of w tokens reaches back w − 1, and its far end is cut as the diagonal is.
        windowed += ((apart > 0) & (apart < window)).sum() + np.minimum(np.arange(1, length + 1), window).size / 2
        windowed += (apart == window).sum() / 2
    less = forward_operations(MODEL, lengths, 0) - forward_operations(mixed, lengths, 0)
    assert less == 2 * 2 * MODEL.query_channels * (whole - windowed)


@pytest.mark.parametrize(
    ("gpu", "fp8", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", False, 989),
        ("NVIDIA H100 80GB HBM3", True, 1979),
        ("NVIDIA H100 PCIe", False, 756),
        ("NVIDIA H100 NVL", False, 835),
        ("NVIDIA H200", False, 989),
        ("NVIDIA B200", True, 4500),
        ("NVIDIA A100-SXM4-80GB", False, 312),
        ("NVIDIA A100 80GB PCIe", True, None),
        ("NVIDIA L4", False, 121),
        ("NVIDIA L40", False, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", False, None),
        ("Tesla V100-SXM2-16GB", False, None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_data_sheet(gpu: str, fp8: bool, tflops: float | None) -> None:
    assert peak_of(gpu, fp8=fp8) == (None if tflops is None else tflops * 1e12)


@pytest.fixture
def pairs() -> PreparedPairs:
    """Two pairs: prompts of 3 and 2 tokens, responses of 4 and 2, and of 1 and 5. Every token is another, so that the
    prompts of a pair differ."""
    starts = np.cumsum([0, 7, 5, 3, 7])
    prompts = np.array([3, 2], dtype=np.int32)
    return replace(ultrafeedback_like(2), tokens=np.arange(22, dtype=np.int32), starts=starts, prompt_lengths=prompts)


@pytest.fixture
def sharing(pairs: PreparedPairs) -> PreparedPairs:
    """The same pairs; the responses of the first have one prompt."""
    tokens = pairs.tokens.copy()
    tokens[7:10] = tokens[:3]
    return replace(pairs, tokens=tokens)


def config_of(source: str, precision: str = "bf16", **loss: str) -> Config:
    settings = LossConfig.model_validate({"type": "tgdpo"} | loss)
    train = TrainConfig.model_validate({"precision": precision})
    return Config(loss=settings, scores=ScoresConfig.model_validate({"source": source}), train=train)


def test_a_steps_rates_are_those_of_its_real_tokens_over_all_ranks(pairs: PreparedPairs) -> None:
    """Both pairs in two seconds on four ranks. A sequence's last token is predicted, and not read."""
    pace = Pace(config_of("cached"), MODEL, pairs, ranks=4, gpu="NVIDIA H100 80GB HBM3")
    metrics = pace.of_step(np.array([1, 0]), 2.0)
    needed = TRAINING * forward_operations(MODEL, np.array([6, 4, 2, 6]), 4 + 2 + 1 + 5)
    assert metrics == {
        "perf/seconds_per_step": 2.0,
        "perf/tokens_per_second": 18 / 2,
        "perf/tflops_per_rank": pytest.approx(needed / 8 / 1e12),
        "perf/mfu": pytest.approx(needed / 8 / 989e12),
    }


def test_frozen_models_count_a_forward_pass_each_and_apart(pairs: PreparedPairs) -> None:
    picked = np.array([0, 1])
    live = Pace(config_of("live"), MODEL, pairs, ranks=1, gpu="NVIDIA H200").of_step(picked, 1.0)
    cached = Pace(config_of("cached"), MODEL, pairs, ranks=1, gpu="NVIDIA H200").of_step(picked, 1.0)
    assert live["perf/tflops_per_rank"] == cached["perf/tflops_per_rank"]
    assert live["perf/frozen_tflops_per_rank"] == pytest.approx(2 / 3 * live["perf/tflops_per_rank"])
    assert live["perf/mfu"] == pytest.approx(5 / 3 * cached["perf/mfu"])


def test_a_shared_prompt_counts_once_in_tokens_and_in_operations(pairs: PreparedPairs, sharing: PreparedPairs) -> None:
    """The rejected response of the first pair has 5 tokens, of which the model reads the fourth alone, after the 3 of
    the prompt. It computes the prompt's own products and attention once, and all labels as before."""
    picked = np.array([0, 1])

    def metrics(data: PreparedPairs, *, shared_prompts: bool = True) -> dict[str, float]:
        config = config_of("cached")
        config.train.shared_prompts = shared_prompts
        return Pace(config, MODEL, data, ranks=1, gpu=None).of_step(picked, 1.0)

    apart, shared = metrics(pairs), metrics(sharing)
    assert apart["perf/tokens_per_second"] == 6 + 4 + 2 + 6
    assert shared["perf/tokens_per_second"] == 6 + 1 + 2 + 6
    prompt = TRAINING * forward_operations(MODEL, np.array([3]), 0)
    assert (apart["perf/tflops_per_rank"] - shared["perf/tflops_per_rank"]) * 1e12 == pytest.approx(prompt)
    assert metrics(sharing, shared_prompts=False) == apart


def test_only_the_responses_that_a_loss_reads_count(pairs: PreparedPairs) -> None:
    pace = Pace(config_of("cached", type="sft"), MODEL, pairs, ranks=1, gpu=None)
    assert pace.of_step(np.array([0, 1]), 1.0)["perf/tokens_per_second"] == 6 + 2


@pytest.mark.parametrize(("gpu", "precision"), [(None, "bf16"), ("NVIDIA H200", "fp32"), ("A new GPU", "bf16")])
def test_without_a_known_peak_no_utilisation_is_claimed(gpu: str | None, precision: str, pairs: PreparedPairs) -> None:
    metrics = Pace(config_of("cached", precision), MODEL, pairs, ranks=1, gpu=gpu).of_step(np.array([0]), 1.0)
    assert "perf/mfu" not in metrics and metrics["perf/tflops_per_rank"] > 0


def spent(waiting: tuple[float, ...] = (0.0,), **seconds: float) -> Spent:
    return Spent(dict.fromkeys(ACTIVITIES, 0.0) | seconds | {WAITING: sum(waiting) / len(waiting)}, waiting)


def test_shares_are_those_of_the_time_since_the_line_before(pairs: PreparedPairs) -> None:
    pace = Pace(config_of("live"), MODEL, pairs, ranks=2, gpu=None)
    first = pace.since_last_line(spent((1.0, 3.0), policy=5.0, frozen=3.0))
    second = pace.since_last_line(spent((1.5, 5.5), policy=6.0, frozen=3.0, saving=4.5))
    assert (first["perf/seconds"], second["perf/seconds"]) == (10.0, 7.0)
    assert {name: first[f"perf/share_{name}"] for name in (POLICY, FROZEN, WAITING, SAVING)} == {
        POLICY: 0.5,
        FROZEN: 0.3,
        WAITING: 0.2,
        SAVING: 0.0,
    }
    assert (first["perf/share_waiting_max"], second["perf/share_waiting_max"]) == (0.3, 2.5 / 7)
    shares = total_shares([{"loss": 0.7}, first, second])
    assert shares[POLICY] == pytest.approx(6 / 17) and shares[SAVING] == pytest.approx(4.5 / 17)
    assert sum(shares.values()) == pytest.approx(1)


def test_lines_of_earlier_versions_say_nothing_of_shares() -> None:
    assert total_shares([{"loss": 0.7, "perf/seconds_per_step": 1.0}]) == {}


def test_a_sentence_says_where_the_time_went() -> None:
    several = spent((10.0, 30.0), policy=60.0, frozen=15.0, saving=4.7, optimizer=0.3)
    assert where_time_went(several) == (
        "60% the policy, 20% waiting (at most 30% on one), 15% frozen models, 5% saving"
    )
    assert where_time_went(spent(policy=3.0, **{OTHER: 1.0})) == "75% the policy, 25% other work"
