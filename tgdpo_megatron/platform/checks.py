"""Refuses packages, switches and Megatron settings that would give wrong numbers without an error."""

from __future__ import annotations

import importlib.util
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from tgdpo_megatron.errors import UserError

CHECKED_MEGATRON_VERSIONS = ("0.16.1",)


def check_packages() -> None:
    """Refuse a megatron-core that was not checked, and an `apex` that is not NVIDIA's.

    Raises:
        UserError: Naming the package found and the one to install.
    """
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise UserError(f"megatron-core is not installed; install {CHECKED_MEGATRON_VERSIONS[-1]}.") from None
    if version not in CHECKED_MEGATRON_VERSIONS:
        raise UserError(
            f"megatron-core {version} was not checked with this project; install one of "
            f"{', '.join(CHECKED_MEGATRON_VERSIONS)}."
        )
    check_apex()


def check_apex() -> None:
    """Refuse a foreign `apex`: megatron-core tests a bare `import apex` and then builds the wrong norms.

    Raises:
        UserError: Where anything importable as `apex` lacks NVIDIA's multi_tensor_apply.
    """
    found = importlib.util.find_spec("apex")
    if found is None:
        return
    # Looked for on disk: importing a foreign apex to ask it may fail in ways of its own.
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        place = found.origin or next(iter(folders), "?")
        raise UserError(
            f"the package 'apex' at {place} is not NVIDIA's apex and would change Megatron's layers; uninstall it."
        )


def check_packed_attention(precision: str) -> None:
    """Refuse Transformer Engine without a kernel that keeps packed sequences apart.

    Its unfused attention knows one mask for a whole batch, not the borders of a pack; the others compute in 16 bits.

    Raises:
        UserError: Where the precision or the environment rules both other kernels out.
    """
    if precision == "fp32":
        raise UserError(
            "train.precision=fp32: Transformer Engine's attention kernels that keep packed sequences apart compute in "
            "16 bits; set train.precision=bf16."
        )
    switched_off = [name for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN") if os.environ.get(name) == "0"]
    if len(switched_off) == 2:
        raise UserError(
            "NVTE_FLASH_ATTN=0 and NVTE_FUSED_ATTN=0 leave Transformer Engine only an attention that cannot keep "
            "packed sequences apart; unset one of them."
        )


def refuse_silent_traps(config: Any) -> None:
    """Refuse settings of a megatron TransformerConfig that give wrong numbers without an error.

    Each was seen to, on gloo with megatron-core 0.16.1:
    freeing a stage's output while an asynchronous send still reads it; two sends between the same two
    pipeline ranks matched in the wrong order; tensor-parallel attributes never set, so that the gradient
    norm counts shards as copies.

    Args:
        config: megatron.core TransformerConfig.

    Raises:
        UserError: Naming the field and the value to use.
    """
    import torch

    on_gloo = not torch.cuda.is_available()
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    if on_gloo and config.deallocate_pipeline_outputs:
        raise UserError("deallocate_pipeline_outputs=True frees buffers that gloo is still sending; set it to False.")
    if interleaved and config.pipeline_model_parallel_size == 2 and config.batch_p2p_comm:
        raise UserError(
            "batch_p2p_comm=True with an interleaved pipeline of 2 ranks mixes up forward and backward messages; "
            "set batch_p2p_comm=False and overlap_p2p_comm=True."
        )
    if not config.perform_initialization:
        raise UserError(
            "perform_initialization=False leaves tensor-parallel weights unmarked, and the gradient norm wrong; "
            "set it to True."
        )
