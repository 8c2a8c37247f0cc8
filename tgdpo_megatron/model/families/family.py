"""What a family of models declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.tensor_maps import TensorMap


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: HuggingFace's `model_type`.
        title: The family's name in sentences.
        architecture: HuggingFace's class of its language models.
        read: (config.json's content, its path) -> the model's shape. Raises UserError for an option that is not built;
            a KeyError, TypeError, ValueError or AttributeError becomes a sentence in the caller.
        tensors: Shape -> every tensor of a model, in the order of the layers.
        megatron: Shape -> the settings of Megatron's TransformerConfig that are particular to the family.
        layer_matrices: Shape -> parameters of one layer's linear products, which tensor-parallel ranks share.
        layer_vectors: Shape -> parameters of one layer's norms and other vectors, which every rank holds whole.
    """

    name: str
    title: str
    architecture: str
    read: Callable[[dict[str, Any], Path], ModelDescription]
    tensors: Callable[[ModelDescription], list[TensorMap]]
    megatron: Callable[[ModelDescription], dict[str, Any]]
    layer_matrices: Callable[[ModelDescription], int]
    layer_vectors: Callable[[ModelDescription], int]
