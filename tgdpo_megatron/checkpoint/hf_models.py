"""HuggingFace models as transformers loads them: the weights, the longest sequence, the device.

No code of a folder is run, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from tgdpo_megatron.errors import UserError, in_short, ran_out_of_memory


def load_model(model_class: Any, folder: Path, device: torch.device, *, leftover: bool = False) -> Any:
    """A model in the dtype that its weights are stored in. transformers would fill what is missing with random numbers.

    Args:
        model_class: A class of transformers, or one of ours that is made like them.
        leftover: Whether the files may hold tensors that the model does not have, such as GPT-2's masks.

    Raises:
        UserError: The weights are damaged, or are not those of this class.
    """
    try:
        model, found = model_class.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
    except Exception as error:  # only transformers' code is in here, and what it raises about a wrong file varies
        if ran_out_of_memory(error):
            raise
        raise UserError(f"{folder}: the model cannot be loaded ({in_short(error)}).") from error
    wrong = {
        "lack": sorted(found["missing_keys"]),
        "have another size for": sorted(str(key[0]) for key in found["mismatched_keys"]),
        "also hold": [] if leftover else sorted(found["unexpected_keys"]),
    }
    for how, names in wrong.items():
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise UserError(f"{folder}: the weights {how} {names[0]}{more}, so this is no {type(model).__name__}.")
    return model.eval().requires_grad_(False).to(device)


def positions_in(folder: Path) -> int | None:
    """As positions_of, by a folder's config.json; None also where transformers does not know the model, but a server
    may."""
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:  # only transformers' code is in here, and what it raises about such a file varies
        return None
    return positions_of(config)


def positions_of(config: Any) -> int | None:
    """Most tokens that a model has positions for, by its configuration, whatever its family calls them; None where it
    does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if type(found) is int and found > 0 else None


def device_of(given: torch.device | str | None) -> torch.device:
    """The device that is asked for; else the first GPU, or the CPU where there is none.

    Raises:
        UserError: There is no such device.
    """
    try:
        return torch.empty(0, device=given or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built for CPUs alone
        raise UserError(f"--device {given}: cannot be used ({in_short(error)}); give another, such as cpu.") from error
