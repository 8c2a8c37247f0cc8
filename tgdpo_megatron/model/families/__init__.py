"""The families of models that can be trained, one file for each.

To support another family, add a file with a :class:`Family` to this folder. Conversion, training and the memory planner
read everything they need from the Family. No file here imports torch when it is loaded, because the planner works
without torch.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import replace
from pathlib import Path

from tgdpo_megatron.bounded import read_json
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families.decoder import check_size
from tgdpo_megatron.model.families.family import Family

__all__ = ["FAMILIES", "Family", "family_of", "layer_parameters", "parameters", "read_description"]


def _declared() -> dict[str, Family]:
    """Every Family that a file of this folder holds, by its `model_type`."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{file}") for file in files]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
    families = {family.name: family for family in found}
    assert len(families) == len({id(family) for family in found}), "two families read one model_type"
    return families


LAYERS = 10_000
"""Most layers of a model. A list of them is made before anything else shows that they cannot be."""
FAMILIES = _declared()
"""HuggingFace's `model_type` -> the family."""


def family_of(description: ModelDescription) -> Family:
    """The family of a model."""
    return FAMILIES[description.family]


def parameters(description: ModelDescription) -> int:
    """Number of parameters of a model, without padding of the vocabulary."""
    return sum(math.prod(tensor.shape) for tensor in family_of(description).tensors(description))


def layer_parameters(description: ModelDescription) -> tuple[int, int]:
    """Parameters of one layer: those that tensor-parallel ranks split, and those of which each rank has a full copy."""
    one_layer = family_of(description).tensors(replace(description, num_layers=1))
    counts = {True: 0, False: 0}
    for tensor in one_layer:
        if tensor.key.startswith("decoder.layers."):
            counts[tensor.split is not None] += math.prod(tensor.shape)
    return counts[True], counts[False]


def read_description(folder: Path) -> ModelDescription:
    """Read config.json of a HuggingFace model folder, and nothing else.

    Raises:
        UserError: No readable config.json, or an architecture or option that is not supported.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder.")
    if not path.is_file():
        raise UserError(f"{folder}: no config.json there; it is not a HuggingFace model folder.")
    config = read_json(path, what="model's configuration")
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, found {type(config).__name__}.")
    if config.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantised; use a bf16 or fp32 copy of the model.")
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    named = config.get("architectures") or [family.architecture if family else kind]
    architecture = named[0] if isinstance(named, list) else named
    if family is None or architecture != family.architecture:
        supported = ", ".join(known.architecture for known in FAMILIES.values())
        kinds = {"ForConditionalGeneration": ", a multimodal model,", "Moe": ", a mixture of experts,"}
        what = next((words for part, words in kinds.items() if part in str(architecture)), "")
        raise UserError(f"{path}: architecture '{architecture}'{what} is not supported; supported: {supported}.")
    try:
        check_size(config, "num_hidden_layers", path, most=LAYERS)
        return replace(family.read(config, path), family=family.name)
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing.") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        words = f"a field has a value of the wrong kind; this is not a {family.title} configuration"
        raise UserError(f"{path}: {words}.") from None
