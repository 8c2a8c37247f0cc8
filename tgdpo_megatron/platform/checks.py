"""Refuses packages, environment variables and Megatron settings that give wrong numbers without an error."""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from tgdpo_megatron.config import TrainConfig
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.platform import versions


def check_packages() -> None:
    """Refuse a megatron-core that was not checked, a Transformer Engine that does not fit it, and a foreign `apex`.

    Raises:
        UserError: A package is refused; the sentence names the package found and the one to install.
    """
    versions.check_megatron()
    check_transformer_engine()
    check_apex()


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine that fails to load, or that does not fit megatron-core.

    Raises:
        UserError: It is refused; the sentence names the version found and those accepted, or says why it does not load.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return
    found = versions.transformer_engine()
    versions.check_transformer_engine_version(found)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # Megatron would fail with a traceback, or use mocks of the layers
        why = (str(error) or type(error).__name__).strip().splitlines()[-1]
        if "libcuda.so" in why:  # the driver's library: without a GPU, where Transformer Engine is left alone
            return
        if "undefined symbol" in why:  # of torch's library, whose names change from version to version
            raise UserError(
                f"Transformer Engine {found} does not load, because it was built for another torch than the installed "
                f"{metadata.version('torch')}; install the torch that it came with, or build it again for this one, or "
                "uninstall it to run on Megatron's local layers."
            ) from None
        raise UserError(
            f"Transformer Engine is installed but does not load ({why}); repair it, or uninstall it with its core and "
            "torch parts to run on Megatron's local layers."
        ) from None


def check_apex() -> None:
    """Refuse a package `apex` that is not NVIDIA's. megatron-core only tries `import apex` and would build wrong norms.

    Raises:
        UserError: A package that can be imported as `apex` lacks NVIDIA's multi_tensor_apply or optimizers.
    """
    found = importlib.util.find_spec("apex")
    if found is None:
        return
    # The package is only looked at on disk, because importing a foreign apex may fail in its own ways.
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        place = found.origin or next(iter(folders), "?")
        raise UserError(
            f"the package 'apex' at {place} is not NVIDIA's apex and would change Megatron's layers; uninstall it."
        )


def check_attention(precision: str, *, transformer_engine: bool) -> None:
    """Refuse an attention that packed sequences cannot use.

    Raises:
        UserError: fp32 with Transformer Engine, whose only attention in fp32 needs memory that grows with the square of
            the tokens. Or one of its attention kernels is switched off, which Megatron forbids by an assertion.
    """
    if transformer_engine and precision == "fp32":
        raise UserError(
            "train.precision=fp32: Transformer Engine's attention kernels for packed sequences compute in 16 bits; set "
            "train.precision=bf16."
        )
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        if (value := os.environ.get(name, "1")) != "1":
            raise UserError(f"{name}={value}: megatron-core needs all attention kernels to choose from; unset {name}.")


def check_fp8(train: TrainConfig) -> None:
    """Refuse FP8 that this process cannot compute. Without Transformer Engine, Megatron would silently leave FP8 out.

    Raises:
        UserError: FP8 cannot be computed here; the sentence says why.
    """
    if train.fp8 is None:
        return
    import torch

    cuda = torch.cuda.is_available()
    reason = why_no_fp8(
        train.recipe_of_fp8,
        capability=torch.cuda.get_device_capability() if cuda else None,
        cuda=torch.version.cuda,
        transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
    )
    if reason:
        raise UserError(f"train.fp8={train.fp8} cannot be computed here: {reason}; leave it out (train.fp8=null).")


def why_no_fp8(
    recipe: str | None, *, capability: tuple[int, int] | None, cuda: str | None, transformer_engine: bool
) -> str | None:
    """Why an FP8 recipe cannot run, or None if it can. The limits are those that Transformer Engine 2.11 itself checks.

    Args:
        capability: The GPU's compute capability; None without a GPU.
        cuda: The CUDA version that torch was built for.
    """
    if capability is None:
        return "there is no GPU"
    if not transformer_engine:
        return "FP8 layers are Transformer Engine's, which is not installed"
    numbers = ".".join(map(str, capability))
    if capability < (8, 9):
        return f"the GPU's compute capability is {numbers}, but FP8 needs 8.9 (Ada) or more"
    if recipe == "blockwise":
        if capability < (9, 0):
            return (
                f"the GPU's compute capability is {numbers}, but train.fp8_recipe=blockwise needs 9.0 (Hopper) or more"
            )
        if tuple(map(int, (cuda or "0.0").split("."))) < (12, 9):
            return f"torch was built for CUDA {cuda}, but train.fp8_recipe=blockwise needs 12.9 or more"
    return None


def refuse_silent_traps(config: Any, *, packed: bool = False) -> None:
    """Refuse settings of a megatron TransformerConfig that give wrong numbers without an error.

    Each was observed on gloo with megatron-core 0.16.1; versions.py says which are mended since. A stage's output is
    freed while an asynchronous send still reads it. Two sends between the same two pipeline ranks are matched in the
    wrong order. The tensor-parallel attributes of weights are never set, so that the gradient norm takes shards for
    copies. Read in its source: RoPE of packed sequences that is not fused takes a table that is as long as the pack for
    one row per token, so that later sequences do not start at position 0; and the fused one leaves out YaRN's factor of
    the attention scores.

    Args:
        config: megatron.core TransformerConfig.
        packed: Whether Megatron is given packed sequences (`thd`), and not the blocks of an attention plan.

    Raises:
        UserError: A setting is refused; the sentence names the field and the value to use.
    """
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    frees_early = interleaved and config.overlap_p2p_comm and not versions.SENDS_BEFORE_FREEING.holds
    if config.deallocate_pipeline_outputs and frees_early:
        raise UserError(
            "deallocate_pipeline_outputs=True frees outputs of an interleaved pipeline that are still being sent; set "
            "it to False."
        )
    if interleaved and config.pipeline_model_parallel_size == 2 and config.batch_p2p_comm:
        raise UserError(
            "batch_p2p_comm=True with an interleaved pipeline of 2 ranks mixes up forward and backward messages; "
            "set batch_p2p_comm=False and overlap_p2p_comm=True."
        )
    if not (config.perform_initialization or versions.MARKS_EVERY_WEIGHT.holds):
        raise UserError(
            "perform_initialization=False leaves tensor-parallel weights unmarked and makes the gradient norm wrong; "
            "set it to True."
        )
    if packed and not config.apply_rope_fusion:
        raise UserError(
            "apply_rope_fusion=False gives the later sequences of a pack wrong positions where the rotary table is as "
            "long as the pack; set it to True."
        )
    if getattr(config, "yarn_rotary_scaling_factor", None) is not None:
        raise UserError("yarn_rotary_scaling_factor is set, but YaRN was not checked; leave it out.")
