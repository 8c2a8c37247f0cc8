"""Load the weights of a reward model with transformers, so that no tensor is missing, left over or of another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tgdpo_megatron.checkpoint.safetensors import HfWeights
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.errors import UserError, in_short, ran_out_of_memory


def load_weights(model_class: Any, folder: Path, device: torch.device) -> Any:
    """A model in the dtype that its weights are stored in. No code of the folder is run, and nothing is unpickled.

    Args:
        model_class: A class of transformers, or one of ours that is made like them.

    Raises:
        UserError: The weights are damaged, or are not those of this class.
    """
    HfWeights(folder)  # whose sentences about damaged shards are better than those of the libraries
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
        "also hold": sorted(found["unexpected_keys"]),
    }
    for how, names in wrong.items():
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise UserError(f"{folder}: the weights {how} {names[0]}{more}, so this is no {type(model).__name__}.")
    return model.eval().requires_grad_(False).to(device)


def load_templated_tokenizer(folder: Path) -> Any:
    """The tokenizer of a reward model that reads conversations.

    Raises:
        UserError: There is no tokenizer, or it has no chat template.
    """
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: the tokenizer has no chat template, without which it is not known how the reward model reads a "
            "conversation; save its template there, as chat_template.jinja."
        )
    return tokenizer


def longest(config: Any, tokenizer: Any) -> int:
    """Most tokens that a model reads, by its configuration and its tokenizer."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
