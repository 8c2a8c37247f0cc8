"""The main job on real preference pairs at TP2×PP2, cached and live: 10 steps here, 30 in `make real`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.real_run import real_run

DATA = Path(os.environ.get("TGDPO_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
PAIRS = DATA / "preferences_instruction.json"

pytestmark = pytest.mark.skipif(not PAIRS.is_file(), reason=f"real preference data is not at {PAIRS} (set TGDPO_DATA)")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("real") / "run"
    return folder, real_run(PAIRS, folder, steps=10)


def test_step_0_has_loss_ln_2(run: tuple[Path, dict[str, float]]) -> None:
    assert run[1]["step 0 − ln 2"] < 1e-6


def test_cached_and_live_runs_have_the_same_losses(run: tuple[Path, dict[str, float]]) -> None:
    # 1e-6 at the first step; over the steps of Adam rounding grows, as it does between any two layouts.
    assert run[1]["cached − live"] < 1e-4


def test_exported_model_loads_in_transformers(run: tuple[Path, dict[str, float]]) -> None:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(run[0] / "aligned-hf", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.model_type == "llama"
