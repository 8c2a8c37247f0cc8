"""Configurations of every family, in the words of HuggingFace's old and new versions, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity.models import FAMILIES, make_config
from tests.support.public_models import PUBLIC_MODELS
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import FAMILIES as OURS
from tgdpo_megatron.model.families import read_description


def read(folder: Path, config: dict[str, Any]) -> ModelDescription:
    (folder / "config.json").write_text(json.dumps(config))
    return read_description(folder)


def test_every_family_is_compared_with_huggingface() -> None:
    assert set(FAMILIES) == set(OURS)
    assert {config["model_type"] for config, _ in PUBLIC_MODELS.values()} == set(OURS)


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_what_huggingface_saves_again_reads_the_same_as_what_was_published(name: str, tmp_path: Path) -> None:
    """transformers writes RoPE, windows and defaults under newer keys than the published files have."""
    from transformers import AutoConfig

    published = read(tmp_path, PUBLIC_MODELS[name][0])
    again = tmp_path / "again"
    AutoConfig.from_pretrained(tmp_path).save_pretrained(again)
    assert "rope_parameters" in json.loads((again / "config.json").read_text())
    content = json.loads((again / "config.json").read_text())
    content["architectures"] = PUBLIC_MODELS[name][0]["architectures"]
    assert read(again, content) == published


def test_windows_are_on_the_layers_that_huggingface_gives_them(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for name, layers in {"Gemma-2-2B": 13, "Gemma-3-1B": 22, "Qwen3-8B": 0, "Mistral-7B-v0.3": 0}.items():
        found = read(tmp_path, PUBLIC_MODELS[name][0])
        theirs = AutoConfig.from_pretrained(tmp_path)
        kinds = getattr(theirs, "layer_types", None) or []
        windowed = [kind == "sliding_attention" for kind in kinds]
        assert [found.is_windowed(layer) for layer in range(found.num_layers)] == (windowed or [False] * 32), name
        assert sum(found.windowed_layers) == layers, name


def test_a_qwen_with_windows_has_them_on_its_last_layers(tmp_path: Path) -> None:
    config = make_config("qwen2", tied=False, use_sliding_window=True, sliding_window=16, max_window_layers=3)
    found = read(tmp_path, {"architectures": ["Qwen2ForCausalLM"], **config.to_dict()})
    assert found.sliding_window == 16 and found.windowed_layers == (False, False, False, True)


def test_mistral_has_its_window_on_every_layer_as_in_huggingface(tmp_path: Path) -> None:
    """HuggingFace reads sliding_window alone, and takes 4096 where it is left out."""
    published = PUBLIC_MODELS["Mistral-7B-v0.3"][0]
    kinds = read(tmp_path, published | {"sliding_window": 8, "layer_types": ["full_attention"] * 32})
    assert kinds.sliding_window == 8 and kinds.windowed_layers == (True,) * 32
    left_out = read(tmp_path, {name: value for name, value in published.items() if name != "sliding_window"})
    assert left_out.sliding_window == 4096


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_fields_that_are_left_out_have_huggingfaces_defaults(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    content = dict(PUBLIC_MODELS[name][0])
    for field in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "query_pre_attn_scalar"):
        content.pop(field, None)
    found, theirs = read(tmp_path, content), AutoConfig.from_pretrained(tmp_path)
    groups = getattr(theirs, "num_key_value_heads", None) or theirs.num_attention_heads
    assert found.num_query_groups == groups and found.tie_word_embeddings == theirs.tie_word_embeddings
    channels = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert found.kv_channels == channels


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("Qwen3-8B", {"rope_scaling": YARN}, "is not supported; supported are plain RoPE and Llama-3.1's scaling"),
        ("Gemma-3-1B", {"rope_scaling": YARN}, "is not supported; supported are plain RoPE, and a linear factor"),
        ("Gemma-3-1B", {"rope_parameters": YARN}, "rope_parameters must have a part for full_attention"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE scaling"),
        ("Gemma-2-2B", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("Gemma-2-2B", {"hidden_activation": "relu"}, "hidden_activation='relu' is not supported"),
        ("Gemma-2-2B", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0 must be a number above 0"),
        ("Qwen3-8B", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("Mistral-7B-v0.3", {"sliding_window": -4}, "sliding_window=-4 is not a size"),
        ("Gemma-2-2B", {"layer_types": ["full_attention"]}, "layer_types must name 26 layers"),
        ("Gemma-2-2B", {"layer_types": ["chunked_attention"] * 26}, "layer_types must name 26 layers"),
        ("Gemma-2-2B", {"query_pre_attn_scalar": "many"}, "query_pre_attn_scalar='many' must be a number above 0"),
        (
            "Qwen3-8B",
            {"num_hidden_layers": 10**12},
            "num_hidden_layers=1000000000000 is not a size; it must be a whole",
        ),
        ("Gemma-2-2B", {"num_hidden_layers": 26.0}, "num_hidden_layers=26.0 is not a size; it must be a whole number"),
        ("Llama-3.2-1B", {"vocab_size": 2**40}, "must be a whole number from 1 to 2147483647"),
        ("Llama-3.2-1B", {"num_attention_heads": True}, "num_attention_heads=True is not a size"),
        ("Llama-3.2-1B", {"num_key_value_heads": 8.5}, "num_key_value_heads=8.5 is not a size"),
        ("Llama-3.2-1B", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a number above 0"),
        ("Llama-3.2-1B", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ("Llama-3.2-1B", {"architectures": {"LlamaForCausalLM": 1}}, "architecture '{'LlamaForCausalLM': 1}' is not"),
        ("Gemma-3-1B", {"sliding_window_pattern": 0}, "a field has a value of the wrong kind"),
        ("Qwen3-8B", {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "supported: Gemma2"),
        ("Gemma-3-1B", {"architectures": ["Gemma3ForConditionalGeneration"]}, "is not supported"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_sentence(
    name: str, changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, PUBLIC_MODELS[name][0] | changed)
    assert words in str(refused.value) and "\n" not in str(refused.value), str(refused.value)
