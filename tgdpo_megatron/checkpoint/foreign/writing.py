"""Writes a HuggingFace folder as a checkpoint that Megatron-Bridge and Megatron-LM load as a start.

FOLDER/latest_checkpointed_iteration.txt  says `release`: these are weights, and not the state of a training
FOLDER/release/                           the weights; common.pt with what Megatron-LM calls its arguments
FOLDER/release/tokenizer/                 config.json and the tokenizer

Megatron-Bridge reads the arguments as well. The tensors of all layers are stacked under one key, as both programs save
them.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tgdpo_megatron.checkpoint.convert import plan
from tgdpo_megatron.checkpoint.failures import writable
from tgdpo_megatron.checkpoint.foreign.folder import RELEASE, TRACKER
from tgdpo_megatron.checkpoint.index import StoredObject
from tgdpo_megatron.checkpoint.manifest import copy_companions
from tgdpo_megatron.checkpoint.torch_dist import write_index_of_boxes
from tgdpo_megatron.checkpoint.work import check_target, work_on
from tgdpo_megatron.model.description import ModelDescription

CHECKPOINT_VERSION = 3.0
"""Of Megatron-LM's checkpoints: 3.0 has a layer's queries, keys and values in the order of today."""
_EXTRA_STATES = (
    *(f"self_attention.{name}" for name in ("linear_qkv", "q_layernorm", "k_layernorm", "core_attention")),
    *("self_attention.linear_proj", "self_attention.linear_proj.post_layernorm"),
    *("mlp.linear_fc1", "mlp.linear_fc2", "mlp.linear_fc2.post_layernorm"),
)
"""The modules of a layer whose state of FP8 one version or another of Transformer Engine or Megatron-Core asks for. A
version that asks for one that is missing refuses to load; the others leave it alone."""


def hf_to_bridge(source: Path, target: Path, *, dtype: str | None = None, processes: int = 1) -> None:
    """Convert a HuggingFace folder to a checkpoint of Megatron-Bridge and Megatron-LM.

    Args:
        source: Folder with config.json and safetensors. A tokenizer in the folder is copied too.
        target: Folder to make. It must not exist, or be empty.
        dtype: `bf16` or `fp32`; default: each tensor as stored.
        processes: How many share the work.

    Raises:
        UserError: As hf_to_megatron, but for the certificate.
    """
    check_target(target)
    planned = plan(source, dtype)
    layers = planned.description.num_layers
    with work_on(target, {**planned.identity, "form": RELEASE}) as work:
        folder = work.folder / RELEASE
        stored, _ = planned.write(work, folder, processes, layers)
        with writable(f"{folder}: the checkpoint"):
            state = {
                "args": Namespace(**arguments(planned.description)),
                "checkpoint_version": CHECKPOINT_VERSION,
                "iteration": 0,
            }
            objects = _write_extra_states(folder, len(planned.parts), layers)
            write_index_of_boxes(folder, stored, state, {}, objects)
            copy_companions(source, folder / "tokenizer")
            (work.folder / TRACKER).write_text(RELEASE, encoding="utf-8")
        work.finish()


def arguments(model: ModelDescription) -> dict[str, Any]:
    """What Megatron-LM would be started with for a model, as far as its arguments can say. Sizes are in elements.

    They have no word for soft-caps, norms after blocks or RoPE of two bases. Megatron-Bridge takes a model's settings
    from its own class, and of these only the sizes of parallelism and what was saved.
    """
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.vocab_size,
        "position_embedding_type": "rope",
        "rotary_base": model.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": model.rope_scaling_factor is not None,
        "rope_scaling_factor": model.rope_scaling_factor or 8.0,
        "normalization": "RMSNorm",
        "norm_epsilon": model.layernorm_epsilon,
        "apply_layernorm_1p": model.zero_centered_norms,
        "swiglu": model.activation == "silu",
        "add_bias_linear": False,
        "add_qkv_bias": model.attention_bias,
        "qk_layernorm": model.qk_layernorm,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }


def _write_extra_states(folder: Path, part: int, layers: int) -> dict[str, StoredObject]:
    """Write one empty state, and say of every module that it is its own.

    Args:
        part: Number of the .distcp file that is written.
    """
    path = folder / f"__{part}_0.distcp"
    torch.save([None], path)
    empty = StoredObject(path.name, 0, path.stat().st_size)
    places = [(f"decoder.layers.{name}", layer, layers) for name in _EXTRA_STATES for layer in range(layers)]
    places.append(("decoder.final_layernorm", 0, 1))
    return {f"{name}._extra_state/shard_{place}_{count}": empty for name, place, count in places}
