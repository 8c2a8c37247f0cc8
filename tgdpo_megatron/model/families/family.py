"""What the file of a family of models declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.decoder import tensors
from tgdpo_megatron.model.tensor_maps import TensorMap


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: HuggingFace's `model_type`.
        title: The family's name in error messages.
        architecture: HuggingFace's class of the family's language models.
        read: (content of config.json, its path) -> shape of the model. Raises UserError for an option that is not
            supported. The caller turns a KeyError, TypeError, ValueError or AttributeError into a sentence.
        tensors: Shape of a model -> all its tensors, in the order of the layers.
    """

    name: str
    title: str
    architecture: str
    read: Callable[[dict[str, Any], Path], ModelDescription]
    tensors: Callable[[ModelDescription], list[TensorMap]] = tensors
