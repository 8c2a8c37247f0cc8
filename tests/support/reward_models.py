"""Small random reward models in the published shapes, and files of answers for them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TEXTS = ["Name a colour that you like, and say why.", "Blue is the colour of the sky.", "The sum of 2 and 3 is 5."]
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer_with(special: Sequence[str]) -> Any:
    """A byte-level tokenizer with more special tokens."""
    from tokenizers import AddedToken

    from tools.make_tiny_model import train_tokenizer

    tokenizer = train_tokenizer(TEXTS * 2, vocab_size=330)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    return tokenizer


def make_classifier(folder: Path, tokenizer: Any, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A sequence classifier with one label. Its scores spread over several units, as those of real ones do."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    fields = {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "vocab_size": len(tokenizer),
        "num_labels": 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **fields))
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_armorm(folder: Path, *, seed: int = 0) -> Path:
    """An ArmoRM: the published names, 19 rewards, three hidden layers of the gate, a transformation that mixes."""
    from transformers import LlamaConfig, LlamaModel

    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = tokenizer_with(names)
    tokenizer.bos_token, tokenizer.chat_template = names[0], LLAMA_3
    more = {"num_objectives": 19, "gating_temperature": 10, "gating_hidden_dim": 24, "gating_n_hidden": 3}
    config = LlamaConfig(
        **SIZES, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024, **more
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tensors = {f"model.{name}": tensor for name, tensor in LlamaModel(config).state_dict().items()}
        tensors["regression_layer.weight"] = torch.randn(19, 32)
        tensors["reward_transform_matrix"] = torch.eye(19) - 0.3 * torch.rand(19, 19)
        tensors["gating.logit_scale"] = torch.tensor([1.7])
        for layer, (fan_in, fan_out) in enumerate([(32, 24), (24, 24), (24, 24), (24, 19)]):
            tensors[f"gating.layers.{layer}.weight"] = 2 * torch.randn(fan_out, fan_in)
            tensors[f"gating.layers.{layer}.bias"] = torch.randn(fan_out)
    return _write(folder, config, "LlamaForRewardModelWithGating", tensors, tokenizer)


def make_pairrm(folder: Path, *, seed: int = 0) -> Path:
    """A PairRM: DeBERTa-v3's attention, [CLS] and [SEP] around every text, the head that compares."""
    from tokenizers.processors import TemplateProcessing
    from transformers import DebertaV2Config, DebertaV2Model

    names = ("[CLS]", "[SEP]", "<|source|>", "<|candidate1|>", "<|candidate2|>")
    tokenizer = tokenizer_with(names)
    tokenizer.chat_template = None
    first, last = (tokenizer.convert_tokens_to_ids(name) for name in names[:2])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", first), ("[SEP]", last)]
    )
    config = DebertaV2Config(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        type_vocab_size=0,
        relative_attention=True,
        max_relative_positions=-1,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        n_tasks=1,
        initializer_range=0.3,  # so that a score depends on all tokens
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = DebertaV2Model(config)
        tensors = {f"pretrained_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
        tensors["head_layer.1.weight"], tensors["head_layer.1.bias"] = torch.randn(32, 64), torch.randn(32)
        tensors["head_layer.4.weight"], tensors["head_layer.4.bias"] = torch.randn(1, 32), torch.randn(1)
    return _write(folder, config, "DebertaV2PairRM", tensors, tokenizer)


def _write(folder: Path, config: Any, name: str, tensors: dict[str, torch.Tensor], tokenizer: Any) -> Path:
    config = copy.deepcopy(config)
    config.architectures = [name]
    config.save_pretrained(folder)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


def answered(
    prompt: Any, answers: Sequence[str], *, unfinished: Sequence[int] = (), model: str = "tiny", **fields: Any
) -> dict[str, Any]:
    """A line of a file of answers. The prompt's id is made of its text."""
    import hashlib

    number = len(answers)
    return {
        "prompt": prompt,
        "format_prompt": f"<|user|>\n{prompt}",
        "prompt_id": hashlib.sha256(json.dumps(prompt).encode()).hexdigest(),
        "all_generated_responses": list(answers),
        "finish_reasons": ["length" if place in unfinished else "stop" for place in range(number)],
        "num_tokens": [len(answer.split()) + 1 for answer in answers],
        "seeds": list(range(number)),
        "model": {"name": model, "fingerprint": "f" * 64},
        "sampling": {"engine": "transformers", "n": number, "temperature": 0.8, "seed": 0},
        "source": {"row": 1},
        **fields,
    }


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
