"""Checkpoints as Megatron-Bridge, Megatron-LM and NeMo 2 save them, made of a HuggingFace model by Megatron-Core's own
saver: a second map of names, and a second way to join tensors, beside those of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tests.support.megatron_lm import of_megatron_lm
from tgdpo_megatron.platform.processes import Ranks

PADDED = 64
"""The vocabulary is padded to a multiple of this, where nothing else is asked for."""


@dataclass(frozen=True)
class Form:
    """How a program lays its checkpoints out."""

    prefix: str = ""
    stacked: bool = True
    """Whether the tensors of all layers lie under one key."""
    fused_norms: bool = True
    """Whether norms have Transformer Engine's names."""
    padded: int = PADDED
    """The vocabulary is padded to a multiple of this."""


@dataclass(frozen=True)
class Piece:
    """What one tensor-parallel rank has of a tensor."""

    name: str
    layer: int | None
    data: Tensor
    axis: int | None = None
    """Along which ranks split the tensor; None where each has all of it."""
    place: int = 0
    """Of this piece among all along the axis."""
    count: int = 1


def pieces(
    weights: dict[str, Tensor], config: dict[str, Any], rank: int, size: int, padded: int = PADDED
) -> Iterator[Piece]:
    """What a rank has of a model.

    Args:
        weights: HuggingFace's.
        config: Of config.json.
        padded: The vocabulary is padded to a multiple of this.
    """

    def part(tensor: Tensor, axis: int) -> Tensor:
        return tensor.tensor_split(size, dim=axis)[rank].contiguous()

    def vocabulary(name: str) -> Tensor:
        rows = weights[name]
        missing = -len(rows) % padded
        return part(torch.cat([rows, torch.full((missing, rows.shape[1]), 7.0, dtype=rows.dtype)]), 0)

    yield Piece("embedding.word_embeddings.weight", None, vocabulary("model.embed_tokens.weight"), 0, rank, size)
    yield Piece("decoder.final_layernorm.weight", None, weights["model.norm.weight"])
    if not config["tie_word_embeddings"]:
        yield Piece("output_layer.weight", None, vocabulary("lm_head.weight"), 0, rank, size)
    groups = config["num_key_value_heads"]
    after = config["model_type"].startswith("gemma")
    for layer in range(config["num_hidden_layers"]):
        of_layer = f"model.layers.{layer}."
        attention, mlp = f"{of_layer}self_attn.", f"{of_layer}mlp."
        for kind in ("weight", "bias"):
            if f"{attention}q_proj.{kind}" not in weights:
                continue
            rows = []
            for group in range(groups * rank // size, groups * (rank + 1) // size):
                for projection in "qkv":
                    rows.append(weights[f"{attention}{projection}_proj.{kind}"].tensor_split(groups)[group])
            yield Piece(f"self_attention.linear_qkv.{kind}", layer, torch.cat(rows), 0, rank, size)
        yield Piece(
            "self_attention.linear_proj.weight", layer, part(weights[f"{attention}o_proj.weight"], 1), 1, rank, size
        )
        for place, projection in enumerate(("gate", "up")):  # Megatron saves the two halves of fc1 apart
            half = part(weights[f"{mlp}{projection}_proj.weight"], 0)
            yield Piece("mlp.linear_fc1.weight", layer, half, 0, place * size + rank, 2 * size)
        yield Piece("mlp.linear_fc2.weight", layer, part(weights[f"{mlp}down_proj.weight"], 1), 1, rank, size)
        norms = {
            "input_layernorm": "self_attention.linear_qkv.layer_norm_weight",
            "self_attn.q_norm": "self_attention.q_layernorm.weight",
            "self_attn.k_norm": "self_attention.k_layernorm.weight",
            "pre_feedforward_layernorm" if after else "post_attention_layernorm": "mlp.linear_fc1.layer_norm_weight",
        }
        if after:
            norms["post_attention_layernorm"] = "self_attention.linear_proj.post_layernorm.weight"
            norms["post_feedforward_layernorm"] = "mlp.linear_fc2.post_layernorm.weight"
        for theirs, ours in norms.items():
            if f"{of_layer}{theirs}.weight" in weights:
                yield Piece(ours, layer, weights[f"{of_layer}{theirs}.weight"])


_LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def sharded(piece: Piece, form: Form, layers: int, rank: int) -> Any:
    """Megatron's record of a piece: its key, and its place in the whole tensor."""
    from megatron.core.dist_checkpointing import ShardedTensor

    name = piece.name if form.fused_norms else _LOCAL_NORMS.get(piece.name, piece.name)
    stack = form.stacked and piece.layer is not None
    within = "" if piece.layer is None else "decoder.layers." if stack else f"decoder.layers.{piece.layer}."
    offsets = [(0, piece.layer, layers)] if stack else []
    if piece.axis is not None:
        offsets.append((piece.axis + stack, piece.place, piece.count))
    return ShardedTensor.from_rank_offsets(
        form.prefix + within + name,
        piece.data,
        *offsets,
        replica_id=0 if piece.axis is not None else rank,
        prepend_axis_num=int(stack),
    )


def objects(form: Form, layers: int, rank: int) -> list[Any]:
    """Megatron's records of what is no tensor: the state of FP8 of each linear layer, and random states."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    names = [f"{form.prefix}decoder.layers.{name}._extra_state" for name in ("mlp.linear_fc1", "mlp.linear_fc2")]
    of_layers = [
        ShardedObject(name, None, (layers,), (layer,), replica_id=rank) for name in names for layer in range(layers)
    ]
    return [*of_layers, ShardedObject("rng_state", [{"seed": 1}], (1,), (0,), replica_id=rank)]


def save(ranks: Ranks, *, jobs: list[dict[str, Any]]) -> None:
    """Save models from all ranks, each split over them, with an optimizer's state and random states beside the weights.

    Args:
        jobs: For each `hf`, a HuggingFace folder, `weights`, the folder to make, `form`, the fields of a Form, and
            `args`, whether Megatron-LM's arguments belong there.
    """
    import json

    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file

    for job in jobs:
        weights = load_file(Path(job["hf"]) / "model.safetensors")
        config = json.loads((Path(job["hf"]) / "config.json").read_text())
        form, layers = Form(**job["form"]), config["num_hidden_layers"]
        found = list(pieces(weights, config, ranks.rank, ranks.world_size, form.padded))
        state: dict[str, Any] = {
            "model": [sharded(piece, form, layers, ranks.rank) for piece in found],
            "objects": objects(form, layers, ranks.rank),
            "optimizer": [
                sharded(piece, Form(f"optimizer.state.exp_avg.{form.prefix}", form.stacked), layers, ranks.rank)
                for piece in found
            ],
            "iteration": 3,
        }
        if job["args"]:
            state["args"] = of_megatron_lm(config)
        if ranks.rank == 0:
            Path(job["weights"]).mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(state, job["weights"], content_metadata={"singleton_local_shards": False})


def loads(ranks: Ranks, *, hf: str, weights: str) -> dict[str, Any]:
    """Load a checkpoint with Megatron-Core's own loader, split over all ranks.

    Returns:
        `differing`: the tensors that are not those of the HuggingFace model; `args`: names of Megatron-LM's arguments.
    """
    import json

    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file

    config = json.loads((Path(hf) / "config.json").read_text())
    layers, form = config["num_hidden_layers"], Form()
    expected = list(pieces(load_file(Path(hf) / "model.safetensors"), config, ranks.rank, ranks.world_size))
    empty = [Piece(one.name, one.layer, torch.zeros_like(one.data), one.axis, one.place, one.count) for one in expected]
    wanted = [sharded(piece, form, layers, ranks.rank) for piece in empty]
    for record in wanted:
        record.allow_shape_mismatch = record.key in ("embedding.word_embeddings.weight", "output_layer.weight")
    state = dist_checkpointing.load({"model": wanted, "objects": objects(form, layers, ranks.rank)[:-1]}, weights)
    own = config["vocab_size"] - ranks.rank * len(expected[0].data)
    differing = []
    for piece, loaded in zip(expected, state["model"], strict=True):
        rows = slice(None) if piece.layer is not None or piece.axis is None else slice(max(0, own))
        if not torch.equal(piece.data[rows], loaded[rows]):
            differing.append(f"{piece.name}, layer {piece.layer}, rank {ranks.rank}")
    everywhere: list[list[str]] = [[]] * ranks.world_size
    torch.distributed.all_gather_object(everywhere, differing)
    return {"differing": [name for names in everywhere for name in names], "args": sorted(vars(state["args"]))}


def settings_of(config: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """What Megatron's configuration of a model says, as the programs write it down."""
    rope = config.get("rope_parameters") or {}
    scaled = rope.get("rope_type") == "llama3"
    gemma = config["model_type"].startswith("gemma")
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "layernorm_epsilon": config["rms_norm_eps"],
        "layernorm_zero_centered_gamma": gemma,
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaled,
        "rope_scaling_factor": rope["factor"] if scaled else 1.0,
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "add_qkv_bias": config["model_type"] == "qwen2",
        "qk_layernorm": config["model_type"] == "qwen3",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "num_moe_experts": None,
        "position_embedding_type": "rope",
        "activation_func": {"_target_": "megatron.core.fusions.fast_gelu" if gemma else "torch.nn.functional.silu"},
        **changed,
    }


def write_settings(folder: Path, program: str, settings: dict[str, Any]) -> None:
    """The file in which a program says what model its checkpoint is of."""
    name, part = {
        "Megatron-Bridge": ("iter_0000003/run_config.yaml", "model"),
        "NeMo 2": ("context/model.yaml", "config"),
    }[program]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump({part: settings}), encoding="utf-8")
