"""Start-up checks: foreign packages, and settings that give wrong numbers in silence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tgdpo_megatron.config import Config, ParallelConfig, TrainConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform.checks import check_attention, check_packages, refuse_silent_traps, why_no_fp8
from tgdpo_megatron.platform.versions import MARKS_EVERY_WEIGHT, SENDS_BEFORE_FREEING

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


def pretend_installed(folder: Path, name: str, version: str) -> None:
    """What importlib.metadata reads of an installed package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_transformer_engine_that_is_too_old_is_refused_at_start(tmp_path: Path) -> None:
    make_package(tmp_path / "transformer_engine", "pytorch")
    pretend_installed(tmp_path, "transformer_engine", "2.8.0")
    done = start_with(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: Transformer Engine 2.8.0 is not accepted ")


@pytest.mark.parametrize("version", ["2.9.0", "2.11.0", "2.9.0+70f53666"])
def test_a_transformer_engine_that_every_megatron_takes_is_accepted(version: str, tmp_path: Path) -> None:
    make_package(tmp_path / "transformer_engine", "pytorch")
    pretend_installed(tmp_path, "transformer_engine", version)
    done = start_with(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_transformer_engine_that_is_there_in_half_is_refused_with_why(tmp_path: Path) -> None:
    """Its core without its torch part, as after a compilation that failed."""
    make_package(tmp_path / "transformer_engine")
    pretend_installed(tmp_path, "transformer_engine", "2.11.0")
    done = start_with(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: Transformer Engine is installed but does not load (No module named 'transformer_engine.pytorch'); "
        "repair it, or uninstall it with its core and torch parts to run on Megatron's local layers.\n"
    )


def test_a_transformer_engine_that_was_built_for_another_torch_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Its compiled part asks for a function that this torch does not have, or has under another name."""
    make_package(tmp_path / "transformer_engine", "pytorch")
    pretend_installed(tmp_path, "transformer_engine", "2.11.0")
    code = tmp_path / "engine.c"
    code.write_text("void _ZN3c105gone(void); void *PyInit_engine_torch(void) { _ZN3c105gone(); return 0; }")
    built = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "engine_torch.so"), str(code)]
    if shutil.which("cc") is None or subprocess.run(built, capture_output=True).returncode:
        pytest.skip("no C compiler here, to build a library with")
    (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").write_text("import engine_torch\n")
    done = start_with(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: Transformer Engine 2.11.0 does not load, because it was built for another torch than the installed "
        f"{version('torch')}; install the torch that it came with, or build it again for this one, or uninstall it to "
        "run on Megatron's local layers.\n"
    )


# ---------------------------------------------------------------- FP8


HOPPER, ADA, AMPERE = (9, 0), (8, 9), (8, 0)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "installed", "reason"),
    [
        ("tensorwise", None, None, False, "there is no GPU"),
        ("tensorwise", HOPPER, "13.0", False, "Transformer Engine's, which is not installed"),
        ("tensorwise", AMPERE, "13.0", True, "capability is 8.0, but FP8 needs 8.9"),
        ("tensorwise", ADA, "12.4", True, None),
        ("delayed", HOPPER, "12.4", True, None),
        ("blockwise", ADA, "13.0", True, "capability is 8.9, but train.fp8_recipe=blockwise needs 9.0"),
        ("blockwise", HOPPER, "12.8", True, "built for CUDA 12.8, but train.fp8_recipe=blockwise needs 12.9"),
        ("blockwise", HOPPER, "12.9", True, None),
        ("blockwise", (10, 0), "13.0", True, None),
    ],
)
def test_fp8_is_refused_where_transformer_engine_would_not_compute_it(
    recipe: str, capability: Any, cuda: str | None, installed: bool, reason: str | None
) -> None:
    said = why_no_fp8(recipe, capability=capability, cuda=cuda, transformer_engine=installed)
    assert said is None if reason is None else said is not None and reason in said


def test_fp8_is_for_the_policy_alone(describe: Any) -> None:
    """Megatron itself would leave FP8 out in silence where there is no Transformer Engine."""
    import torch

    from tgdpo_megatron.model.build import transformer_config

    settings = Config(train=TrainConfig(fp8="hybrid"))
    assert transformer_config(describe, settings, trained=False).fp8 is None
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="train.fp8=hybrid cannot be computed here: there is no GPU; leave it out"):
            transformer_config(describe, settings)


def test_fp8_is_refused_for_a_model_whose_sizes_it_does_not_divide(describe: Any) -> None:
    from dataclasses import replace

    from tgdpo_megatron.model.description import check_fp8_sizes

    fp8 = TrainConfig(fp8="hybrid", fp8_recipe="blockwise")
    one, two = ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)
    gathered = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    sizes = {"hidden_size": 192, "ffn_hidden_size": 368, "num_attention_heads": 4, "num_query_groups": 2}
    model = replace(describe, **sizes, kv_channels=48)
    check_fp8_sizes(model, Config(parallel=one, train=fp8))
    with pytest.raises(UserError, match="multiples of 16, but the model has 40 hidden channels; leave train.fp8 out"):
        check_fp8_sizes(replace(model, hidden_size=40), Config(parallel=one, train=fp8))
    with pytest.raises(UserError, match="multiples of 16, but the model has 184 feed-forward channels on each of 2"):
        check_fp8_sizes(model, Config(parallel=two, train=fp8))
    with pytest.raises(UserError, match="multiples of 128, but the model has 192 hidden channels"):
        check_fp8_sizes(model, Config(parallel=gathered, train=fp8))


# ---------------------------------------------------------------- silent traps


@pytest.fixture(scope="module")
def describe(hf_model: Path) -> Any:
    from tgdpo_megatron.model.families import read_description

    return read_description(hf_model)


@pytest.fixture
def interleaved(describe: Any) -> Any:
    """Megatron's configuration of a tiny model in two pipeline stages of one interleaved layer each."""
    from tgdpo_megatron.model.build import transformer_config

    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    config = transformer_config(_four_layers(describe), Config(parallel=parallel))
    refuse_silent_traps(config)  # what we build is accepted
    return config


def refused_unless(mended: bool, sentence: str) -> AbstractContextManager[Any]:
    """Expects a refusal where the installed megatron-core has a trap, and none where it is mended."""
    return nullcontext() if mended else pytest.raises(UserError, match=sentence)


def _four_layers(description: Any) -> Any:
    from dataclasses import replace

    return replace(description, num_layers=4)


def test_freeing_outputs_that_are_still_being_sent_is_refused_where_megatron_does_so(interleaved: Any) -> None:
    """It may under a megatron-core that waits; tests/distributed/test_mended_traps.py shows that it does."""
    interleaved.deallocate_pipeline_outputs = True
    with refused_unless(SENDS_BEFORE_FREEING.holds, "deallocate_pipeline_outputs=True .* set it to False"):
        refuse_silent_traps(interleaved)


def test_batched_messages_between_two_interleaved_ranks_are_refused(interleaved: Any) -> None:
    interleaved.batch_p2p_comm = True
    with pytest.raises(UserError, match="batch_p2p_comm=True .* set batch_p2p_comm=False"):
        refuse_silent_traps(interleaved)


def test_unmarked_tensor_parallel_weights_are_refused_where_megatron_leaves_them_so(interleaved: Any) -> None:
    interleaved.perform_initialization = False
    with refused_unless(MARKS_EVERY_WEIGHT.holds, "perform_initialization=False .* set it to True"):
        refuse_silent_traps(interleaved)


def test_packs_whose_rope_is_not_fused_are_refused(interleaved: Any) -> None:
    """Where the rotary table is as long as the pack, Megatron takes it for one row per token of the pack."""
    refuse_silent_traps(interleaved, packed=False)
    with pytest.raises(UserError, match="apply_rope_fusion=False .* set it to True"):
        refuse_silent_traps(interleaved, packed=True)


def test_megatrons_packed_rope_still_has_the_trap() -> None:
    """Two sequences of four tokens get positions 0 to 7 from a table of eight rows, and 0 to 3 twice from a longer one.
    A megatron-core where this fails has mended it, and the refusal can go."""
    import torch
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    class OneRank:
        def size(self) -> int:
            return 1

        def rank(self) -> int:
            return 0

    boundaries = torch.tensor([0, 4, 8], dtype=torch.int32)
    table = torch.arange(16.0)[:, None, None, None] * torch.tensor([1.0, 0.5, 1.0, 0.5])
    states = torch.ones(8, 1, 4)
    short, long = (
        _apply_rotary_pos_emb_thd(states, boundaries, rows, cp_group=OneRank()) for rows in (table[:8], table)
    )
    assert torch.equal(long[:4], long[4:])
    assert not torch.equal(short[:4], short[4:])


def test_yarn_is_refused(interleaved: Any) -> None:
    interleaved.yarn_rotary_scaling_factor = 4.0
    with pytest.raises(UserError, match="YaRN was not checked"):
        refuse_silent_traps(interleaved)


@pytest.mark.parametrize("name", ["NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"])
def test_an_attention_kernel_that_is_switched_off_is_refused_by_name(
    name: str, describe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tgdpo_megatron.model.build import transformer_config

    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match=f"{name}=0: .* unset {name}"):
        transformer_config(describe, Config())
    monkeypatch.setenv(name, "1")
    transformer_config(describe, Config())


def test_fp32_with_transformer_engine_is_refused() -> None:
    check_attention("fp32", transformer_engine=False)
    check_attention("bf16", transformer_engine=True)
    with pytest.raises(UserError, match="set train.precision=bf16"):
        check_attention("fp32", transformer_engine=True)


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
