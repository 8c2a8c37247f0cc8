"""Start-up checks: foreign packages, unchecked versions, and settings that give wrong numbers in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tgdpo_megatron.config import Config, ParallelConfig, TrainConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform.checks import (
    CHECKED_MEGATRON_VERSIONS,
    check_packages,
    check_packed_attention,
    refuse_silent_traps,
)

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
from tgdpo_megatron.platform.checks import check_packages
from tgdpo_megatron.errors import one_sentence_errors
with one_sentence_errors():
    check_packages()
"""


def start_with(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the start-up checks in a process that finds `folder` before the installed packages."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment)


def make_package(folder: Path, *modules: str) -> None:
    for module in ("", *modules):
        (folder / module).mkdir(parents=True, exist_ok=True)
        (folder / module / "__init__.py").touch()


def test_the_installed_packages_are_accepted() -> None:
    check_packages()


def test_a_foreign_apex_is_refused_in_one_sentence(tmp_path: Path) -> None:
    make_package(tmp_path / "apex")
    done = start_with(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: the package 'apex' at {tmp_path / 'apex' / '__init__.py'} is not NVIDIA's apex and would change "
        "Megatron's layers; uninstall it.\n"
    )


def test_an_apex_folder_without_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    done = start_with(tmp_path)
    assert done.returncode == 2 and f"'apex' at {tmp_path / 'apex'} is not NVIDIA's" in done.stderr


def test_an_apex_that_does_not_import_is_refused(tmp_path: Path) -> None:
    """The package registry's `apex` needs packages that are not there."""
    make_package(tmp_path / "apex")
    (tmp_path / "apex" / "__init__.py").write_text("from pyramid.session import Session\n")
    done = start_with(tmp_path)
    assert done.returncode == 2 and "is not NVIDIA's apex" in done.stderr and "Traceback" not in done.stderr


def test_an_apex_laid_out_like_nvidias_is_accepted(tmp_path: Path) -> None:
    make_package(tmp_path / "apex", "multi_tensor_apply", "optimizers")
    assert start_with(tmp_path).returncode == 0


def test_an_unchecked_megatron_core_is_refused_with_both_versions(tmp_path: Path) -> None:
    info = tmp_path / "megatron_core-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 99.0\n")
    done = start_with(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: megatron-core 99.0 was not checked with this project; install one of ")
    assert all(version in done.stderr for version in CHECKED_MEGATRON_VERSIONS)


# ---------------------------------------------------------------- silent traps


@pytest.fixture(scope="module")
def describe(hf_model: Path) -> Any:
    from tgdpo_megatron.model.description import read_description

    return read_description(hf_model)


@pytest.fixture
def interleaved(describe: Any) -> Any:
    """Megatron's configuration of a tiny model in two pipeline stages of one interleaved layer each."""
    from tgdpo_megatron.model.build import transformer_config

    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    config = transformer_config(_four_layers(describe), Config(parallel=parallel))
    refuse_silent_traps(config)  # what we build is accepted
    return config


def _four_layers(description: Any) -> Any:
    from dataclasses import replace

    return replace(description, num_layers=4)


def test_freeing_outputs_that_gloo_still_sends_is_refused(interleaved: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("only gloo reads an output after it was handed over")
    interleaved.deallocate_pipeline_outputs = True
    with pytest.raises(UserError, match="deallocate_pipeline_outputs=True .* set it to False"):
        refuse_silent_traps(interleaved)


def test_batched_messages_between_two_interleaved_ranks_are_refused(interleaved: Any) -> None:
    interleaved.batch_p2p_comm = True
    with pytest.raises(UserError, match="batch_p2p_comm=True .* set batch_p2p_comm=False"):
        refuse_silent_traps(interleaved)


def test_unmarked_tensor_parallel_weights_are_refused(interleaved: Any) -> None:
    interleaved.perform_initialization = False
    with pytest.raises(UserError, match="perform_initialization=False .* set it to True"):
        refuse_silent_traps(interleaved)


def test_packing_is_refused_where_no_attention_kernel_separates_segments(
    describe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tgdpo_megatron.model import build

    monkeypatch.setattr(build, "HAVE_TRANSFORMER_ENGINE", True)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(UserError, match="cannot keep packed sequences apart; unset one of them"):
        build.transformer_config(describe, Config())
    monkeypatch.delenv("NVTE_FUSED_ATTN")
    check_packed_attention("bf16")
    with pytest.raises(UserError, match="set train.precision=bf16"):
        check_packed_attention("fp32")


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ],
    ids=str,
)
def test_what_we_build_has_no_silent_trap(parallel: Any, precision: str, recompute: str, describe: Any) -> None:
    from tgdpo_megatron.model.build import transformer_config

    settings = Config(parallel=ParallelConfig(**parallel), train=TrainConfig(precision=precision, recompute=recompute))
    config = transformer_config(_four_layers(describe), settings)
    refuse_silent_traps(config)
    assert config.calculate_per_token_loss and config.hidden_dropout == 0 == config.attention_dropout
    assert (config.recompute_granularity == "full") == (recompute == "full")
