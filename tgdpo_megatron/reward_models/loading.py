"""Load the weights of a reward model with transformers, so that no tensor is missing, left over or of another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tgdpo_megatron.checkpoint.hf_models import load_model, positions_of
from tgdpo_megatron.checkpoint.safetensors import HfWeights
from tgdpo_megatron.data.tokenizer import load_tokenizer
from tgdpo_megatron.errors import UserError


def load_weights(model_class: Any, folder: Path, device: torch.device) -> Any:
    """As load_model. No tensor may be left over, lest the model be of another kind.

    Raises:
        UserError: The weights are damaged, or are not those of this class.
    """
    HfWeights(folder)  # whose sentences about damaged shards are better than those of the libraries
    return load_model(model_class, folder, device)


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
    """Most tokens that a model reads. Some families, such as RoBERTa, have positions that no token may take, of which
    only the tokenizer tells."""
    limit: int = tokenizer.model_max_length
    return min(positions_of(config) or limit, limit)
