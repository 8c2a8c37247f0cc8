"""HuggingFace folders: configurations, tokenizers and weights that are damaged, foreign or impossible."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.inputs.entry import BadInput, convert, cut, edit_json, remove, train

INDEX = "hf/model.safetensors.index.json"
TOKENS = ("tools.tokens", "pairs.jsonl", "hf")
WRONG = {"rope_type": "yarn", "factor": 4.0}


def config(name: str, says: str, **changes: Any) -> BadInput:
    """A configuration of a model with some fields changed; `...` leaves one out."""
    return BadInput(name, convert(), says, make=edit_json("hf/config.json", **changes))


def weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes the weights, and writes them again."""

    def make(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "hf" / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})

    return make


def _not_finite(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"][7] = math.nan


def _one_fewer(tensors: dict[str, Any]) -> None:
    del tensors["model.norm.weight"]


def _one_more(tensors: dict[str, Any]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()


def _another_shape(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def _integers(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].byte()


def sharded(entry: Callable[[str], Any]) -> Callable[[Path], None]:
    """The weights under another name, and an index: name of a tensor -> what `entry` says of it."""

    def make(folder: Path) -> None:
        from safetensors import safe_open

        shard = (folder / "hf" / "model.safetensors").rename(folder / "hf" / "a.safetensors")
        (folder / "hf" / "b.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
        with safe_open(shard, framework="numpy") as file:
            names = list(file.keys())
        (folder / INDEX).write_text(json.dumps({"weight_map": {name: entry(name) for name in names}}))

    return make


def index(name: str, content: Any, says: str) -> BadInput:
    """An index of shards with something wrong."""
    return BadInput(name, convert(), says, files={INDEX: content}, make=remove("hf/model.safetensors"))


ENTRIES = [
    BadInput(
        "a model that is not there",
        convert("no"),
        "no: no such folder; a model on a hub is named ORGANISATION/NAME or ORGANISATION/NAME@REVISION.",
    ),
    BadInput("a model that is a file", convert("pairs.jsonl"), "pairs.jsonl: no such model folder."),
    BadInput(
        "a path that is no name on a hub",
        train("model.checkpoint=models/meta-llama/Llama-3-8B"),
        "models/meta-llama/Llama-3-8B: no such folder; a model on a hub is named ORGANISATION/NAME or "
        "ORGANISATION/NAME@REVISION.",
    ),
    BadInput(
        "a model on a hub, without network",
        train("model.checkpoint=nobody/model"),
        "nobody/model: no such file or folder, no */huggingface/hub/models--nobody--model in the hub's "
        "cache, and HF_HUB_OFFLINE=1 forbids asking https://huggingface.co; set HF_HUB_OFFLINE=0, or "
        "fill the cache where there is a network.",
    ),
    BadInput(
        "no configuration",
        convert(),
        "hf: no config.json there; it is not a HuggingFace model folder.",
        make=remove("hf/config.json"),
    ),
    BadInput(
        "a configuration that is no JSON",
        convert(),
        "hf/config.json line 2: not valid JSON (Expecting value).",
        files={"hf/config.json": '{"a": \n'},
    ),
    BadInput(
        "a configuration that is a list",
        convert(),
        "hf/config.json: expected an object, found list.",
        files={"hf/config.json": "[]"},
    ),
    BadInput(
        "a configuration in Latin-1",
        convert(),
        "hf/config.json: byte 7 is not UTF-8 text.",
        files={"hf/config.json": b'{"a": "\xe9"}'},
    ),
    BadInput(
        "a configuration nested 100,000 deep",
        convert(),
        "hf/config.json: lists or mappings are nested more than 100 deep.",
        files={"hf/config.json": "[" * 100_000},
    ),
    BadInput(
        "a configuration with 5,000 digits",
        convert(),
        "hf/config.json: holds an integer of 5,000 digits; at most 100 are read.",
        files={"hf/config.json": '{"a": ' + "9" * 5000 + "}"},
    ),
    BadInput(
        "a configuration of 20 MB",
        convert(),
        "hf/config.json: has more than 16,777,216 bytes, which is too much for a model's configuration.",
        files={"hf/config.json": " " * 20_000_000},
    ),
    config(
        "a model of another kind",
        "hf/config.json: architecture 'MambaForCausalLM' is not supported; supported: Gemma2ForCausalLM, "
        "Gemma3ForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM.",
        model_type="mamba",
        architectures=["MambaForCausalLM"],
    ),
    config(
        "a mixture of experts",
        "hf/config.json: architecture 'Qwen3MoeForCausalLM', a mixture of experts, is not supported; "
        "supported: Gemma2ForCausalLM, Gemma3ForCausalLM, LlamaForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM.",
        model_type="qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
    ),
    config(
        "a multimodal model",
        "hf/config.json: architecture 'Gemma3ForConditionalGeneration', a multimodal model, is not "
        "supported; supported: Gemma2ForCausalLM, Gemma3ForCausalLM, LlamaForCausalLM, "
        "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM.",
        architectures=["Gemma3ForConditionalGeneration"],
    ),
    config(
        "architectures as a mapping",
        "hf/config.json: architecture '{'LlamaForCausalLM': 1}' is not supported; supported: "
        "Gemma2ForCausalLM, Gemma3ForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
        "Qwen3ForCausalLM.",
        architectures={"LlamaForCausalLM": 1},
    ),
    config(
        "10^12 layers",
        "hf/config.json: num_hidden_layers=1000000000000 is not a size; it must be a whole number from 1 to 10000.",
        num_hidden_layers=10**12,
    ),
    config(
        "4.0 layers",
        "hf/config.json: num_hidden_layers=4.0 is not a size; it must be a whole number from 1 to 10000.",
        num_hidden_layers=4.0,
    ),
    config(
        "no layers",
        "hf/config.json: num_hidden_layers=0 is not a size; it must be a whole number from 1 to 10000.",
        num_hidden_layers=0,
    ),
    config("a field left out", "hf/config.json: 'hidden_size' is missing.", hidden_size=...),
    config(
        "a hidden size in words",
        "hf/config.json: hidden_size='large' is not a size; it must be a whole number from 1 to 2147483647.",
        hidden_size="large",
    ),
    config(
        "2^40 words in the vocabulary",
        "hf/config.json: vocab_size=1099511627776 is not a size; it must be a whole number from 1 to 2147483647.",
        vocab_size=2**40,
    ),
    config(
        "heads that do not divide the hidden size",
        "hf: model.layers.0.self_attn.q_proj.weight has shape (64, 64), but config.json describes (63, 64).",
        num_attention_heads=7,
        head_dim=...,
        num_key_value_heads=7,
    ),
    config(
        "a norm's epsilon that is not finite",
        "hf/config.json: rms_norm_eps=inf must be a number above 0.",
        rms_norm_eps=math.inf,
    ),
    config(
        "a scaling of RoPE that is not known",
        "hf/config.json: RoPE scaling 'yarn' with these settings is not supported; supported are plain "
        "RoPE and Llama-3.1's scaling, which is called llama3. Where a model was published without it, "
        "delete the entry.",
        rope_parameters=WRONG,
    ),
    config(
        "another activation", "hf/config.json: hidden_act='relu' is not supported; only 'silu' is.", hidden_act="relu"
    ),
    config(
        "quantised weights",
        "hf/config.json: the weights are quantised; use a bf16 or fp32 copy of the model.",
        quantization_config={"bits": 4},
    ),
    config(
        "more layers than the weights have",
        "hf: the weights lack the tensor model.layers.2.input_layernorm.weight, and 8 more.",
        num_hidden_layers=3,
    ),
    config(
        "fewer layers than the weights have",
        "hf: model.layers.1.input_layernorm.weight, and 8 more does not belong to the model that "
        "config.json describes.",
        num_hidden_layers=1,
    ),
    config(
        "another width than the weights have",
        "hf: model.embed_tokens.weight has shape (330, 64), but config.json describes (330, 128).",
        hidden_size=128,
        head_dim=16,
    ),
    # Weights.
    BadInput(
        "no weights",
        convert(),
        "hf: no weights there (model.safetensors or model.safetensors.index.json); other formats are not "
        "read, because they would have to be unpickled.",
        make=remove("hf/model.safetensors"),
    ),
    BadInput(
        "pickled weights alone",
        convert(),
        "hf: no weights there (model.safetensors or model.safetensors.index.json); other formats are not "
        "read, because they would have to be unpickled.",
        files={"hf/pytorch_model.bin": b"\x80\x02."},
        make=remove("hf/model.safetensors"),
    ),
    BadInput(
        "weights that were cut",
        convert(),
        "hf/model.safetensors: this weight shard is damaged or truncated (Error while deserializing "
        "header: incomplete metadata, file not fully covered); download it again.",
        make=cut("hf/model.safetensors", 0.9),
    ),
    BadInput(
        "weights of no bytes",
        convert(),
        "hf/model.safetensors: this weight shard is damaged or truncated (Error while deserializing "
        "header: header too small); download it again.",
        files={"hf/model.safetensors": b""},
    ),
    BadInput(
        "weights whose header is 2^63 long",
        convert(),
        "hf/model.safetensors: this weight shard is damaged or truncated (Error while deserializing "
        "header: header too large); download it again.",
        files={"hf/model.safetensors": b"\xff" * 7 + b"\x7f{}"},
    ),
    BadInput(
        "a weight that is not finite",
        convert(),
        "hf: model.norm.weight holds numbers that are not finite.",
        make=weights(_not_finite),
        late=True,
    ),
    BadInput(
        "a weight too few", convert(), "hf: the weights lack the tensor model.norm.weight.", make=weights(_one_fewer)
    ),
    BadInput(
        "a weight too many",
        convert(),
        "hf: model.layers.2.mlp.up_proj.weight does not belong to the model that config.json describes.",
        make=weights(_one_more),
    ),
    BadInput(
        "a weight of another shape",
        convert(),
        "hf: model.norm.weight has shape (63,), but config.json describes (64,).",
        make=weights(_another_shape),
    ),
    BadInput(
        "a weight of whole numbers",
        convert(),
        "hf: model.norm.weight is stored as U8, so the weights are quantised; use a bf16 or fp32 copy of the model.",
        make=weights(_integers),
    ),
    index(
        "an index that is no JSON",
        "{",
        "hf/model.safetensors.index.json line 1: not valid JSON (Expecting property name enclosed in double quotes).",
    ),
    index(
        "an index nested 100,000 deep",
        "[" * 100_000,
        "hf/model.safetensors.index.json: lists or mappings are nested more than 100 deep.",
    ),
    index(
        "an index that is a list",
        [],
        "hf/model.safetensors.index.json: the index of the weight shards is damaged; download it again.",
    ),
    index(
        "an index of numbers",
        {"weight_map": {"model.norm.weight": 1}},
        "hf/model.safetensors.index.json: the index of the weight shards is damaged; download it again.",
    ),
    index(
        "an index that leads out of its folder",
        {"weight_map": {"model.norm.weight": "../a.safetensors"}},
        "hf/model.safetensors.index.json: the index of the weight shards is damaged; download it again.",
    ),
    index(
        "an index that names a tensor twice",
        '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        "hf/model.safetensors.index.json: the index names a twice; download it again.",
    ),
    index(
        "an index whose shard is missing",
        {"weight_map": {"model.norm.weight": "a.safetensors"}},
        "hf/a.safetensors: this weight shard is missing; download it again.",
    ),
    BadInput(
        "an index that names the wrong shard",
        convert(),
        "hf/b.safetensors: the index says that this shard holds model.layers.0.input_layernorm.weight, "
        "but it does not.",
        make=sharded(lambda name: "b.safetensors" if "norm" in name else "a.safetensors"),
    ),
    # Tokenizers.
    BadInput(
        "a tokenizer that is no JSON",
        TOKENS,
        "hf: the tokenizer cannot be loaded (Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)).",
        files={"hf/tokenizer.json": "{"},
        late=True,
    ),
    BadInput(
        "a tokenizer nested 100,000 deep",
        TOKENS,
        "hf: the tokenizer cannot be loaded (maximum recursion depth exceeded while decoding a JSON "
        "array from a unicode string).",
        files={"hf/tokenizer.json": "[" * 100_000},
    ),
    BadInput(
        "a tokenizer's settings nested 100,000 deep",
        TOKENS,
        "hf: the tokenizer cannot be loaded (maximum recursion depth exceeded while decoding a JSON "
        "array from a unicode string).",
        files={"hf/tokenizer_config.json": "[" * 100_000},
        late=True,
    ),
    BadInput(
        "no tokenizer",
        TOKENS,
        "hf: no tokenizer.json there; give a checkpoint, or a HuggingFace folder with its tokenizer.",
        make=lambda folder: [p.unlink() for p in (folder / "hf").glob("tokenizer*")] and None,
    ),
    BadInput(
        "a tokenizer without template",
        TOKENS,
        "the tokenizer has no chat template; give data.template=FILE.jinja, or data.template=none for "
        "texts that are taken as they are.",
        make=lambda folder: (folder / "hf" / "chat_template.jinja").unlink(),
        late=True,
    ),
]
