"""The FP8 evidence: only a policy's transformer layers are touched, and what must cancel cancels."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import run_ranks

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the fast variant wrote. A row may fail: its few steps teach nothing."""
    output = tmp_path_factory.mktemp("fp8") / "fp8.json"
    command = [sys.executable, "-W", "ignore", "-m", "bench.fp8", "--fast", f"--json={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and output.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    assert "emulated on CPU" in done.stdout
    return json.loads(output.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_the_same_noise_in_both_models_cancels_before_training_if_the_packs_are_the_same(
    summary: dict[str, Any],
) -> None:
    for cases in summary["step_0"]["recipes"].values():
        assert cases["all, same packs"]["from_ln2"]["max"] == 0
        assert cases["policy"]["from_ln2"]["max"] > 1e-4


def test_a_scale_a_tensor_makes_scores_depend_on_the_pack_and_a_scale_a_token_does_not(
    summary: dict[str, Any],
) -> None:
    for packing in summary["packing"].values():
        assert packing["tensorwise"]["moved"] > 0.5
        assert packing["blockwise"]["responses"]["max"] < 1e-3 < packing["tensorwise"]["responses"]["max"]


def test_training_starts_from_ln_2(summary: dict[str, Any]) -> None:
    assert summary["curves"]["bf16"]["loss"][0] == pytest.approx(math.log(2), abs=1e-5)


def test_the_emulation_is_under_the_four_products_of_each_layer_and_nothing_else(checkpoint: Path) -> None:
    found = run_ranks("tests.support.emulation", "changed_layers", 1, folder=str(checkpoint))
    names = ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"]
    assert sorted(found["emulated"]) == sorted(f"decoder.layers.{layer}.{name}" for layer in (0, 1) for name in names)
    assert found["taken away"] == []
    assert found["same again"] and found["differs"]
