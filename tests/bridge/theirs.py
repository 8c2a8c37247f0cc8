"""What Megatron-Bridge does with a model, in its own environment: python -m tests.bridge.theirs ACTION FOLDER …

make FAMILY HF       make a small HuggingFace model with random weights, and a tokenizer
save HF CHECKPOINT   import a HuggingFace model, and save it as Megatron-Bridge does
load CHECKPOINT HF OUT   make the model of HF with other weights, load a checkpoint, and export it to OUT
versions             print the versions of the packages, in JSON
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from typing import Any

VOCABULARY = 300
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}
_LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500000.0, "rope_scaling": _LLAMA_3_1, "tie_word_embeddings": False},
    "qwen2": {"rope_theta": 1000000.0, "tie_word_embeddings": False},
    "qwen3": {"head_dim": 16, "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16, "tie_word_embeddings": True},
}
"""What the small models have beside the sizes, as their config.json says it."""
PACKAGES = ("megatron-bridge", "megatron-core", "transformers", "torch", "nvidia-modelopt")


def make(family: str, folder: str) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SIZES, **FAMILIES[family]))
    for weight in model.parameters():  # norms and biases, too, so that none can be left out
        weight.data.add_(0.05 * torch.randn_like(weight))
    model.to(torch.bfloat16).save_pretrained(folder)
    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)


def save(hf: str, checkpoint: str) -> None:
    bridge, model = _model(hf)
    bridge.load_hf_weights(model)
    bridge.save_megatron_model(model, checkpoint, hf_tokenizer_path=hf)


def load(checkpoint: str, hf: str, output: str) -> None:
    """As a training begins whose `checkpoint.pretrained_checkpoint` names the checkpoint."""
    bridge, model = _model(hf)
    from megatron.bridge.training.checkpointing import load_checkpoint
    from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
    from megatron.bridge.training.state import GlobalState
    from megatron.core.optimizer import OptimizerConfig
    from safetensors.torch import save_file

    state = GlobalState()
    state.cfg = ConfigContainer(
        model=model[0].config,
        train=None,
        optimizer=OptimizerConfig(use_distributed_optimizer=False),
        ddp=None,
        scheduler=None,
        dataset=None,
        logger=LoggerConfig(),
        tokenizer=None,
        checkpoint=CheckpointConfig(pretrained_checkpoint=checkpoint),
    )
    load_checkpoint(state, model, None, None)
    weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
    save_file({name: weight.contiguous() for name, weight in weights}, output)


def _model(hf: str) -> tuple[Any, Any]:
    """Megatron-Bridge's bridge of a HuggingFace model, and its Megatron model with random weights."""
    from tests.bridge.layers import install

    install()
    import torch
    import torch.distributed as dist
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    bridge = AutoBridge.from_hf_pretrained(hf, dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.use_cpu_initialization = provider.perform_initialization = True
    for fused in ("gradient_accumulation", "bias_dropout", "bias_activation", "masked_softmax"):
        setattr(provider, f"{fused}_fusion", False)
    provider.persist_layer_norm = provider.apply_rope_fusion = False
    provider.finalize()
    return bridge, provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def versions() -> None:
    print(json.dumps({package: metadata.version(package) for package in PACKAGES} | {"python": sys.version.split()[0]}))


if __name__ == "__main__":
    {"make": make, "save": save, "load": load, "versions": versions}[sys.argv[1]](*sys.argv[2:])
