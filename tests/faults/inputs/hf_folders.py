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


def weights(change: Callable[[dict[str, Any]], None], names: tuple[str, ...] = ("model",)) -> Callable[[Path], None]:
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
    BadInput("a model that is not there", convert("no"), "?"),
    BadInput("a model that is a file", convert("pairs.jsonl"), "?"),
    BadInput("a path that is no name on a hub", train("model.checkpoint=models/meta-llama/Llama-3-8B"), "?"),
    BadInput("a model on a hub, without network", train("model.checkpoint=nobody/model"), "?"),
    BadInput("no configuration", convert(), "?", make=remove("hf/config.json")),
    BadInput("a configuration that is no JSON", convert(), "?", files={"hf/config.json": '{"a": \n'}),
    BadInput("a configuration that is a list", convert(), "?", files={"hf/config.json": "[]"}),
    BadInput("a configuration in Latin-1", convert(), "?", files={"hf/config.json": b'{"a": "\xe9"}'}),
    BadInput("a configuration nested 100,000 deep", convert(), "?", files={"hf/config.json": "[" * 100_000}),
    BadInput(
        "a configuration with 5,000 digits", convert(), "?", files={"hf/config.json": '{"a": ' + "9" * 5000 + "}"}
    ),
    BadInput("a configuration of 20 MB", convert(), "?", files={"hf/config.json": " " * 20_000_000}),
    config("a model of another kind", "?", model_type="mamba", architectures=["MambaForCausalLM"]),
    config("a mixture of experts", "?", model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"]),
    config("a multimodal model", "?", architectures=["Gemma3ForConditionalGeneration"]),
    config("architectures as a mapping", "?", architectures={"LlamaForCausalLM": 1}),
    config("10^12 layers", "?", num_hidden_layers=10**12),
    config("4.0 layers", "?", num_hidden_layers=4.0),
    config("no layers", "?", num_hidden_layers=0),
    config("a field left out", "?", hidden_size=...),
    config("a hidden size in words", "?", hidden_size="large"),
    config("2^40 words in the vocabulary", "?", vocab_size=2**40),
    config("heads that do not divide the hidden size", "?", num_attention_heads=7, head_dim=..., num_key_value_heads=7),
    config("a norm's epsilon that is not finite", "?", rms_norm_eps=math.inf),
    config("a scaling of RoPE that is not known", "?", rope_parameters=WRONG),
    config("another activation", "?", hidden_act="relu"),
    config("quantised weights", "?", quantization_config={"bits": 4}),
    config("more layers than the weights have", "?", num_hidden_layers=3),
    config("fewer layers than the weights have", "?", num_hidden_layers=1),
    config("another width than the weights have", "?", hidden_size=128, head_dim=16),
    # Weights.
    BadInput("no weights", convert(), "?", make=remove("hf/model.safetensors")),
    BadInput(
        "pickled weights alone",
        convert(),
        "?",
        files={"hf/pytorch_model.bin": b"\x80\x02."},
        make=remove("hf/model.safetensors"),
    ),
    BadInput("weights that were cut", convert(), "?", make=cut("hf/model.safetensors", 0.9)),
    BadInput("weights of no bytes", convert(), "?", files={"hf/model.safetensors": b""}),
    BadInput(
        "weights whose header is 2^63 long", convert(), "?", files={"hf/model.safetensors": b"\xff" * 7 + b"\x7f{}"}
    ),
    BadInput("a weight that is not finite", convert(), "?", make=weights(_not_finite)),
    BadInput("a weight too few", convert(), "?", make=weights(_one_fewer)),
    BadInput("a weight too many", convert(), "?", make=weights(_one_more)),
    BadInput("a weight of another shape", convert(), "?", make=weights(_another_shape)),
    BadInput("a weight of whole numbers", convert(), "?", make=weights(_integers)),
    index("an index that is no JSON", "{", "?"),
    index("an index nested 100,000 deep", "[" * 100_000, "?"),
    index("an index that is a list", [], "?"),
    index("an index of numbers", {"weight_map": {"model.norm.weight": 1}}, "?"),
    index("an index that leads out of its folder", {"weight_map": {"model.norm.weight": "../a.safetensors"}}, "?"),
    index("an index that names a tensor twice", '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "?"),
    index("an index whose shard is missing", {"weight_map": {"model.norm.weight": "a.safetensors"}}, "?"),
    BadInput(
        "an index that names the wrong shard",
        convert(),
        "?",
        make=sharded(lambda name: "b.safetensors" if "norm" in name else "a.safetensors"),
    ),
    # Tokenizers.
    BadInput("a tokenizer that is no JSON", TOKENS, "?", files={"hf/tokenizer.json": "{"}),
    BadInput("a tokenizer nested 100,000 deep", TOKENS, "?", files={"hf/tokenizer.json": "[" * 100_000}),
    BadInput(
        "a tokenizer's settings nested 100,000 deep", TOKENS, "?", files={"hf/tokenizer_config.json": "[" * 100_000}
    ),
    BadInput(
        "no tokenizer",
        TOKENS,
        "?",
        make=lambda folder: [p.unlink() for p in (folder / "hf").glob("tokenizer*")] and None,
    ),
    BadInput(
        "a tokenizer without template",
        TOKENS,
        "?",
        make=lambda folder: (folder / "hf" / "chat_template.jinja").unlink(),
    ),
]
