"""The configurations of public models of 1B to 72B parameters, as their config.json has them, with their sizes.

The numbers of parameters are HuggingFace's, shown on the models' pages.
"""

from __future__ import annotations

from typing import Any

_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(sizes: tuple[int, ...], vocab: int, *, tied: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_sizes(sizes, vocab),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        **more,
    }


def _mistral(sizes: tuple[int, ...], vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **_sizes(sizes, vocab),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen2(sizes: tuple[int, ...], vocab: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_sizes(sizes, vocab),
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": sizes[2],
        "tie_word_embeddings": tied,
    }


def _qwen3(sizes: tuple[int, ...], *, tied: bool = False) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **_sizes(sizes, 151936),
        "head_dim": 128,
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": sizes[2],
        "tie_word_embeddings": tied,
    }


def _gemma2(sizes: tuple[int, ...], head_dim: int, query_scalar: int) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **_sizes(sizes, 256000),
        "head_dim": head_dim,
        "query_pre_attn_scalar": query_scalar,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    }


def _gemma3(sizes: tuple[int, ...], vocab: int, head_dim: int, query_scalar: int, window: int, **more: Any) -> Any:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **_sizes(sizes, vocab),
        "head_dim": head_dim,
        "query_pre_attn_scalar": query_scalar,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": window,
        "sliding_window_pattern": 6,
        **more,
    }


def _sizes(sizes: tuple[int, ...], vocab: int) -> dict[str, Any]:
    hidden, ffn, layers, heads, groups = sizes
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
    }


_NEW, _LONG = {"rope_theta": 500000.0, "max_position_embeddings": 131072}, {"max_position_embeddings": 131072}

PUBLIC_MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7B": (_llama((4096, 11008, 32, 32, 32), 32000, max_position_embeddings=4096), 6_738_415_616),
    "Llama-3-8B": (
        _llama((4096, 14336, 32, 32, 8), 128256, rope_theta=500000.0, max_position_embeddings=8192),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        _llama(
            (2048, 8192, 16, 32, 8),
            128256,
            tied=True,
            head_dim=64,
            rope_scaling={**_LLAMA_3_ROPE, "factor": 32.0},
            **_NEW,
        ),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        _llama(
            (3072, 8192, 28, 24, 8),
            128256,
            tied=True,
            head_dim=128,
            rope_scaling={**_LLAMA_3_ROPE, "factor": 32.0},
            **_NEW,
        ),
        3_212_749_824,
    ),
    "Llama-3.3-70B": (
        _llama((8192, 28672, 80, 64, 8), 128256, rope_scaling={**_LLAMA_3_ROPE, "factor": 8.0}, **_NEW),
        70_553_706_496,
    ),
    "Mistral-7B-v0.3": (
        _mistral((4096, 14336, 32, 32, 8), 32768, rope_theta=1000000.0, max_position_embeddings=32768),
        7_248_023_552,
    ),
    "Mistral-Nemo-12B": (
        _mistral((5120, 14336, 40, 32, 8), 131072, head_dim=128, rope_theta=1000000.0, **_LONG),
        12_247_782_400,
    ),
    "Mistral-Small-24B": (
        _mistral((5120, 32768, 40, 32, 8), 131072, head_dim=128, rope_theta=1e8, max_position_embeddings=32768),
        23_572_403_200,
    ),
    "Qwen2.5-1.5B": (_qwen2((1536, 8960, 28, 12, 2), 151936, tied=True), 1_543_714_304),
    "Qwen2.5-7B": (_qwen2((3584, 18944, 28, 28, 4), 152064), 7_615_616_512),
    "Qwen2.5-72B": (_qwen2((8192, 29568, 80, 64, 8), 152064), 72_706_203_648),
    "Qwen3-1.7B": (_qwen3((2048, 6144, 28, 16, 8), tied=True), 1_720_574_976),
    "Qwen3-8B": (_qwen3((4096, 12288, 36, 32, 8)), 8_190_735_360),
    "Qwen3-32B": (_qwen3((5120, 25600, 64, 64, 8)), 32_762_123_264),
    "Gemma-2-2B": (_gemma2((2304, 9216, 26, 8, 4), 256, 256), 2_614_341_888),
    "Gemma-2-9B": (_gemma2((3584, 14336, 42, 16, 8), 256, 256), 9_241_705_984),
    "Gemma-2-27B": (_gemma2((4608, 36864, 46, 32, 16), 128, 144), 27_227_128_320),
    "Gemma-3-1B": (_gemma3((1152, 6912, 26, 4, 1), 262144, 256, 256, 512), 999_885_952),
}
"""Name -> content of config.json, and number of parameters."""
