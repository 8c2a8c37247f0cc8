"""A TGDPO step on a GPU against HuggingFace's model, float64 losses and torch's AdamW on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.matrix import prepare
from tests.parity.models import FAMILIES
from tests.support.gpu_where import HAVE_TRANSFORMER_ENGINE, LOCAL, TRANSFORMER_ENGINE, on_gpu

ROWS: list[dict[str, Any]] = [
    {"scores": "live", "recompute": "none", "micro_batch_size": 2},
    {"scores": "cached", "recompute": "none", "micro_batch_size": 2},
    {"scores": "live", "recompute": "none", "tokens": 80},
    {"scores": "cached", "recompute": "selective", "micro_batch_size": 2},
    {"scores": "cached", "recompute": "full", "micro_batch_size": 2},
    {"scores": "live", "recompute": "none", "micro_batch_size": 2, "shared": False},
]
NAMES = ["live", "cached", "live, packs of 80 tokens", "selective recompute", "full recompute", "live, prompts apart"]
LIMITS = {
    # A few times what fp32 gives on a CPU: a GPU adds products up in another order.
    "fp32": {"logps": 2e-5, "loss": 2e-5, "gradient": 2e-5, "grad norm": 2e-5, "weights": 1e-4, "ln 2": 1e-6},
    # The oracle's weights are not rounded. Logits of size 4 have bf16 steps of 2^-6 = 0.016, products before them
    # round as well; a loss takes a tenth of a sum over 20 tokens; gradients are below 1, with 8 bits; a weight near 1
    # has steps of 2^-7, and each of two Adam steps of 1e-3 can go the other way where a gradient is near 0.
    "bf16": {"logps": 0.1, "loss": 5e-3, "gradient": 1e-2, "grad norm": 2e-2, "weights": 1.2e-2, "ln 2": 1e-6},
}


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and two steps of HuggingFace's with the scores they read."""
    folder = tmp_path_factory.mktemp("oracle")
    prepare(folder, "llama", False, {"TGDPO"})
    return folder


@pytest.fixture(scope="session")
def run(oracle: Path) -> Callable[[str, str], dict[str, dict[str, Any]]]:
    """A function that runs all rows with some layers in some precision, once."""

    @functools.cache
    def steps(layers: str, precision: str) -> dict[str, dict[str, Any]]:
        rows = [row | {"precision": precision} for row in ROWS]
        found = on_gpu("steps", layers=layers, module="tests.support.gpu_jobs", folder=str(oracle), rows=rows)
        return dict(zip(NAMES, found, strict=True))

    return steps


@pytest.fixture
def steps(arithmetic: tuple[str, str], run: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = run(*arithmetic)
    return found


@pytest.mark.parametrize("row", NAMES)
def test_step_is_huggingfaces(row: str, steps: dict[str, dict[str, Any]], arithmetic: tuple[str, str]) -> None:
    """Log-probs, losses, gradients, their norm, and weights after two steps; step 0 with policy = reference is ln 2."""
    errors = steps[row]["errors"]
    over = {kind: error for kind, error in errors.items() if not error <= LIMITS[arithmetic[1]][kind]}
    assert not over, over
    assert ("ln 2" in errors) == row.startswith("live")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_a_step_of_every_family_is_huggingfaces(
    family: str, arithmetic: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Gemma-2's attention is ours on either kind of layers; the others' is the layers' own."""
    layers, precision = arithmetic
    folder = tmp_path_factory.mktemp(family)
    prepare(folder, family, False, {"TGDPO"})
    rows = [{"family": family, "precision": precision, "scores": "live", "tokens": 80}]
    (found,) = on_gpu("steps", layers=layers, module="tests.support.gpu_jobs", folder=str(folder), rows=rows)
    over = {kind: error for kind, error in found["errors"].items() if not error <= LIMITS[precision][kind]}
    assert not over, over


def test_recompute_gives_the_loss_of_keeping_everything(
    steps: dict[str, dict[str, Any]], arithmetic: tuple[str, str]
) -> None:
    """The same kernels on the same numbers; a second step's gradients may be summed in another order."""
    for row in ("selective recompute", "full recompute"):
        assert steps[row]["losses"][0] == pytest.approx(steps["cached"]["losses"][0], abs=1e-6)
        assert steps[row]["losses"][1] == pytest.approx(steps["cached"]["losses"][1], abs=LIMITS[arithmetic[1]]["loss"])


def test_layers_of_either_kind_give_the_losses_of_fp32(layers: str, run: Callable[..., Any]) -> None:
    exact, found = (run(*of)["cached"]["losses"] for of in ((LOCAL, "fp32"), (layers, "bf16")))
    assert found == pytest.approx(exact, abs=LIMITS["bf16"]["loss"])
    assert found != exact


@pytest.mark.skipif(not HAVE_TRANSFORMER_ENGINE, reason="Transformer Engine is not installed")
def test_both_kinds_of_layers_give_the_same_losses(run: Callable[..., Any]) -> None:
    for name in NAMES:
        local, engine = (run(layers, "bf16")[name]["losses"] for layers in (LOCAL, TRANSFORMER_ENGINE))
        assert engine == pytest.approx(local, abs=LIMITS["bf16"]["loss"])
        assert engine != local, "the same kernels: were the layers Transformer Engine's?"
