"""Which tensor of a foreign checkpoint is which of ours.

The programs build their models of Megatron-Core's layers, as this project does, so that a tensor's name inside the
model is the same everywhere: a family's file has the names. Three things differ:

- a prefix: NeMo 2 saves the model as a part of its own, `module.`;
- layers: Megatron stacks a tensor of all layers under one key, `decoder.layers.mlp.linear_fc2.weight`, with the layers
  along its first axis. Our checkpoints, and those that Megatron calls non-homogeneous, have a key for each layer,
  `decoder.layers.0.mlp.linear_fc2.weight`;
- norms: Megatron's layers without Transformer Engine have a module of their own for the norm before a linear layer.
  Megatron's layer specs give its weight Transformer Engine's name in checkpoints; a spec of a user's own may not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tgdpo_megatron.checkpoint.foreign.folder import Foreign
from tgdpo_megatron.checkpoint.index import ForeignIndex, Index
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.families.decoder import EMBEDDING, layer_of
from tgdpo_megatron.model.tensor_maps import TensorMap

_PREFIXES = ("", "module.")
_WITHOUT_TRANSFORMER_ENGINE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def as_ours(foreign: Foreign, tensors: Sequence[TensorMap], like: Path) -> Index:
    """The tensors of a foreign checkpoint, by our keys.

    Args:
        tensors: Those of the model.
        like: The folder of the config.json that describes the model.

    Raises:
        UserError: The checkpoint does not hold exactly the tensors of the model, the optimizer's left out.
    """
    index, described = ForeignIndex(foreign.weights), like / "config.json"
    keys = {key for key in index.tensors if "optimizer" not in key.split(".")}
    if not keys:
        raise UserError(
            f"{foreign.given}: holds the state of an optimizer at most, and no weights; give the checkpoint that has "
            "them."
        )
    prefix = _prefix(keys, foreign)
    places: dict[str, tuple[str, int | None]] = {}
    for tensor in tensors:
        if (place := _place(tensor.key, prefix, keys)) is None:
            raise UserError(f"{foreign.given}: the weights lack {prefix}{tensor.key}, which {described} describes.")
        places[tensor.key] = place
    stored = {name: index.tensor(name) for name in dict.fromkeys(name for name, _ in places.values())}
    layers = 1 + max(layer for key in places if (layer := layer_of(key)[0]) is not None)
    for name, layer in places.values():
        if layer is not None and stored[name].shape[:1] != (layers,):
            raise UserError(
                f"{foreign.given}: {name} has shape {stored[name].shape}, but {described} describes {layers} layers."
            )
    if left := sorted(keys - stored.keys()):
        more = f", and {len(left) - 1} more," if len(left) > 1 else ""
        raise UserError(f"{foreign.given}: {left[0]}{more} does not belong to the model that {described} describes.")
    return {
        key: stored[name] if layer is None else stored[name].along_first_axis(layer)
        for key, (name, layer) in places.items()
    }


def _prefix(keys: set[str], foreign: Foreign) -> str:
    """What stands before the names of all tensors.

    Raises:
        UserError: There are no word embeddings, or the language model is a part of another one.
    """
    found = sorted(key.removesuffix(EMBEDDING) for key in keys if key.endswith(EMBEDDING))
    if not found:
        raise UserError(
            f"{foreign.given}: has no {EMBEDDING}, so it is no whole language model; an adapter has to be merged into "
            "its model first."
        )
    if found[0] not in _PREFIXES:
        raise UserError(
            f"{foreign.given}: the language model is the part '{found[0]}' of another model, such as a multimodal one, "
            "which is not supported."
        )
    return found[0]


def _place(key: str, prefix: str, keys: set[str]) -> tuple[str, int | None] | None:
    """The name that a tensor of ours has among some keys, and its layer where that name is of all layers.

    None where there is no such name.
    """
    layer, stacked = layer_of(key)
    for form, of_layer in ((key, None), (stacked, layer)):
        for ours, other in (("", ""), *_WITHOUT_TRANSFORMER_ENGINE.items()):
            name = prefix + (form.replace(ours, other) if ours else form)
            if name in keys:
                return name, of_layer
    return None
