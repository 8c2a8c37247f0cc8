"""Attention kernels are tried before they are used: a right one is found, a wrong one is refused by its fault."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tgdpo_megatron.config import Config, ParallelConfig, TrainConfig
from tgdpo_megatron.data.attention_plan import AttentionPlan
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model import build, kernels
from tgdpo_megatron.model.build import settle_attention
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.kernels import by_formula, find_kernel, why_not

HEADS, GROUPS, CHANNELS = 4, 2, 16
CPU = torch.device("cpu")
LLAMA = ModelDescription(2, 64, 96, HEADS, GROUPS, CHANNELS, 330, 256, 1e-5, False, 1e4, None)


class Right:
    """A kernel by torch's own attention with a mask, block after block, in the precision it is given."""

    DIAGONAL_FROM_THE_END = True

    def __init__(self, heads: int, groups: int, channels: int, scale: float) -> None:
        self.scale = scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        found = []
        for q, k, v in zip(
            query.split(plan.query_lengths), key.split(plan.key_lengths), value.split(plan.key_lengths), strict=True
        ):
            diagonal = len(k) - len(q) if self.DIAGONAL_FROM_THE_END else 0
            seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(diagonal)
            attended = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=seen, scale=self.scale, enable_gqa=True
            )
            found.append(attended[0].transpose(0, 1).flatten(1))
        return torch.cat(found)


class TopLeft(Right):
    """The same, with the mask of older kernels: the first query sees the first key alone."""

    DIAGONAL_FROM_THE_END = False


class WithoutGradients(Right):
    """Right numbers that carry no gradient."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        return super().__call__(query.detach(), key.detach(), value.detach(), plan)


class OwnScale(Right):
    """A kernel that takes the usual scale, whatever it is given."""

    def __init__(self, heads: int, groups: int, channels: int, scale: float) -> None:
        self.scale = channels**-0.5


class TopLeftWhereMostAreEqual(Right):
    """A kernel that chooses its mask by the most queries and the most keys of a block."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        kernel = TopLeft if plan.most_queries == plan.most_keys else Right
        return kernel(HEADS, GROUPS, CHANNELS, self.scale)(query, key, value, plan)


class WrongGradients(Right):
    """Right numbers, and half of the gradient of the values."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        return super().__call__(query, key, 0.5 * value + 0.5 * value.detach(), plan)


class EveryKey(Right):
    """No mask at all."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        ones = AttentionPlan.of([1] * len(query), [n for q, n in _blocks(plan) for _ in range(q)], None)
        blocks = zip(key.split(plan.key_lengths), value.split(plan.key_lengths), plan.query_lengths, strict=True)
        pairs = [(k, v) for k, v, queries in blocks for _ in range(queries)]
        return super().__call__(query, torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]), ones)


class NotInstalled(Right):
    def __init__(self, heads: int, groups: int, channels: int, scale: float) -> None:
        raise ModuleNotFoundError("No module named 'transformer_engine'")


class NotForThese(Right):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        raise ValueError("No dot product attention backend is available\nfor the provided inputs.")


FAULTS = {
    TopLeft: "it aligns the mask of fewer queries than keys at the top left",
    WrongGradients: "its numbers are wrong for fewer queries than keys",
    TopLeftWhereMostAreEqual: "it aligns the mask of fewer queries than keys at the top left",
    OwnScale: "its numbers are wrong for fewer queries than keys",
    WithoutGradients: "element 0 of tensors does not require grad",
    EveryKey: "its numbers are wrong for fewer queries than keys",
    NotInstalled: "No module named 'transformer_engine'",
    NotForThese: "No dot product attention backend is available",
}


def _blocks(plan: AttentionPlan) -> list[tuple[int, int]]:
    return list(zip(plan.query_lengths, plan.key_lengths, strict=True))


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    """What was found is kept for the process."""
    find_kernel.cache_clear()
    yield
    find_kernel.cache_clear()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_right_kernel_has_no_fault(groups: int) -> None:
    assert why_not(Right, HEADS, groups, CHANNELS, CPU) is None


@pytest.mark.parametrize("candidate", FAULTS, ids=lambda candidate: candidate.__name__)
def test_a_wrong_kernel_is_refused_with_its_fault(candidate: Any) -> None:
    fault = why_not(candidate, HEADS, GROUPS, CHANNELS, CPU)
    assert fault is not None and fault.startswith(FAULTS[candidate]) and "\n" not in fault


def test_what_kernels_are_compared_with_is_torchs_attention_in_double_precision() -> None:
    generator = torch.Generator().manual_seed(1)
    plan = AttentionPlan.of((3, 2), (3, 5), None)
    query, key, value = (
        torch.randn(rows, heads, CHANNELS, generator=generator, dtype=torch.float64)
        for rows, heads in ((5, HEADS), (8, GROUPS), (8, GROUPS))
    )
    expected = Right(HEADS, GROUPS, CHANNELS, 0.3)(query, key, value, plan)
    torch.testing.assert_close(by_formula(query, key, value, plan, 0.3), expected, rtol=0, atol=1e-12)


def test_the_first_right_kernel_is_taken_and_the_faults_of_those_before_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "CANDIDATES", {"one": NotInstalled, "two": TopLeft, "three": Right, "four": Right})
    kernel, faults = find_kernel(HEADS, GROUPS, CHANNELS, CPU)
    assert kernel is Right
    assert faults == f"one: {FAULTS[NotInstalled]}; two: {FAULTS[TopLeft]}"


def test_where_none_is_right_there_is_none_and_every_fault_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CANDIDATES", {"one": NotInstalled, "two": WrongGradients})
    kernel, faults = find_kernel(HEADS, GROUPS, CHANNELS, CPU)
    assert kernel is None
    assert faults == f"one: {FAULTS[NotInstalled]}; two: {FAULTS[WrongGradients]}"


# ---------------------------------------------------------------- what a program does without one


@pytest.fixture
def with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with Transformer Engine's layers, as far as the choice of a kernel sees it; kernels run on the CPU."""
    monkeypatch.setattr(build, "HAVE_TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(build, "find_kernel", lambda *sizes: find_kernel(*sizes[:3], CPU))


@pytest.fixture
def top_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CANDIDATES", {"Transformer Engine": TopLeft})


@pytest.mark.usefixtures("with_transformer_engine", "top_left_alone")
def test_without_a_kernel_prompts_are_not_shared_and_a_sentence_says_why() -> None:
    config, change = settle_attention(Config(), LLAMA)
    assert not config.train.shared_prompts and not config.picks_keys
    assert change == (
        "each response has a prompt of its own, because no attention kernel can share prompts here "
        f"(Transformer Engine: {FAULTS[TopLeft]})"
    )


@pytest.mark.usefixtures("with_transformer_engine", "top_left_alone")
def test_without_a_kernel_context_parallelism_is_refused() -> None:
    with pytest.raises(UserError) as refusal:
        settle_attention(Config(parallel=ParallelConfig(context_parallel_size=2)), LLAMA)
    assert str(refusal.value) == (
        "parallel.context_parallel_size=2 needs an attention kernel for fewer queries than keys, and none works here "
        f"(Transformer Engine: {FAULTS[TopLeft]}); set it to 1."
    )


@pytest.mark.usefixtures("with_transformer_engine")
def test_with_a_kernel_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CANDIDATES", {"Transformer Engine": Right})
    assert settle_attention(Config(), LLAMA) == (Config(), None)


@pytest.mark.usefixtures("with_transformer_engine")
@pytest.mark.parametrize(
    ("config", "description"),
    [
        (Config(train=TrainConfig(shared_prompts=False)), LLAMA),
        (Config(), replace(LLAMA, attention_softcap=50.0)),
        (Config(parallel=ParallelConfig(context_parallel_size=2)), replace(LLAMA, sliding_window=8)),
    ],
    ids=["no plan", "soft-cap", "window"],
)
def test_where_no_kernel_is_needed_none_is_tried(
    config: Config, description: ModelDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a plan Transformer Engine's own way does; soft-caps and windows are computed without a kernel."""
    monkeypatch.setattr(kernels, "CANDIDATES", {})
    assert settle_attention(config, description) == (config, None)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", Right), ("fp32", None)])
def test_a_model_in_fp32_is_given_no_kernel_of_16_bits(
    precision: str, expected: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with local layers, which compute one block after another where they have no kernel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(build, "find_kernel", lambda *_: (Right, ""))
    config = Config.model_validate({"train": {"precision": precision}})
    assert build.transformer_config(LLAMA, config).kernel is expected


def test_local_layers_need_no_kernel_on_a_cpu() -> None:
    for config in (Config(), Config(parallel=ParallelConfig(context_parallel_size=2))):
        assert settle_attention(config, LLAMA) == (config, None)


@pytest.mark.usefixtures("with_transformer_engine", "top_left_alone")
def test_local_layers_without_a_kernel_on_a_gpu_share_no_prompts_and_split_sequences_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They compute one block after another, which is slow where a block has fewer queries than keys. In fp32 no kernel
    is looked for."""
    monkeypatch.setattr(build, "HAVE_TRANSFORMER_ENGINE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config, change = settle_attention(Config(), LLAMA)
    assert not config.train.shared_prompts and change is not None and FAULTS[TopLeft] in change
    for kept in (
        Config(parallel=ParallelConfig(context_parallel_size=2)),
        Config.model_validate({"train": {"precision": "fp32"}}),
    ):
        assert settle_attention(kept, LLAMA) == (kept, None)


def test_torch_is_asked_in_the_words_of_the_installed_version() -> None:
    """Its kernel runs on a GPU alone, but its signature is the same here."""
    query, key = torch.zeros(5, HEADS, CHANNELS), torch.zeros(8, GROUPS, CHANNELS)
    kernel = kernels.TorchKernel(HEADS, GROUPS, CHANNELS, 0.3)
    asked = inspect.signature(kernel.attention)
    kernel.attention = lambda *given, **named: asked.bind(*given, **named).arguments["query"]
    assert kernel(query, key, key, AttentionPlan.of((3, 2), (3, 5), None)).shape == (5, HEADS * CHANNELS)
