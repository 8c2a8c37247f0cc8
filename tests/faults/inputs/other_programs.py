"""Checkpoints of Megatron-Bridge, Megatron-LM and NeMo: `release` is one, made of `hf`."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.inputs.entry import BadInput, cut, edit_json, train

NEMO_1 = (
    "is a checkpoint of NeMo 1, which is not read; make one of NeMo 2 of it first, with "
    "scripts/checkpoint_converters/convert_nemo1_to_nemo2.py of NeMo 2, or load it there and export it to HuggingFace."
)
AGAIN = "load it with the program that saved it, and save it with the checkpoint format torch_dist."
OTHER = "give the model that the checkpoint was made from with --like."
Make = Callable[[Path], object]


def _made(*changes: Make) -> Callable[[Path], None]:
    """Makes the checkpoint, and changes it."""

    def make(folder: Path) -> None:
        from tgdpo_megatron.checkpoint.foreign.writing import hf_to_bridge

        hf_to_bridge(folder / "hf", folder / "foreign")
        for change in changes:
            change(folder)

    return make


def foreign(name: str, says: str, *changes: Make, like: str | None = "hf", **more: Any) -> BadInput:
    """A checkpoint with something wrong, to be converted."""
    given = () if like is None else ("--like", like)
    return BadInput(
        name, ("tools.convert_megatron_to_hf", "foreign", "out", *given), says, make=_made(*changes), **more
    )


def _state(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(folder: Path) -> None:
        import torch

        path = folder / "foreign/release/common.pt"
        state = torch.load(path, weights_only=False)
        change(state)
        torch.save(state, path)

    return make


def _arguments(**changed: object) -> Make:
    """The arguments of Megatron-LM, some of them changed."""
    return _state(lambda state: state.update(args=Namespace(**{**vars(state["args"]), **changed})))


def _of_bridge(**model: object) -> Make:
    """Makes it one of Megatron-Bridge, with some settings."""
    return lambda folder: (folder / "foreign/release/run_config.yaml").write_text(json.dumps({"model": model}))


def _weights_of_nemo(folder: Path) -> None:
    _of_nemo(folder)
    _nemos_settings(folder)


def _of_nemo(folder: Path) -> None:
    (folder / "foreign/release").rename(folder / "foreign/weights")
    (folder / "foreign/latest_checkpointed_iteration.txt").unlink()


def _nemos_settings(folder: Path) -> None:
    (folder / "foreign/context").mkdir()
    (folder / "foreign/context/model.yaml").write_text("tokenizer: {}\n")


def _renamed(rename: Callable[[str], str]) -> Make:
    """All tensors have other names."""

    def make(folder: Path) -> None:
        path = folder / "foreign/release/.metadata"
        index = pickle.loads(path.read_bytes())
        index.state_dict_metadata = {rename(key): entry for key, entry in index.state_dict_metadata.items()}
        for place in list(index.storage_data):
            info = index.storage_data.pop(place)
            index.storage_data[type(place)(rename(place.fqn), place.offset, place.index)] = info
        path.write_bytes(pickle.dumps(index))

    return make


def _other_tokenizer(folder: Path) -> None:
    path = folder / "foreign/release/tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


def _archive(folder: Path) -> None:
    with tarfile.open(folder / "model.nemo", "w") as archive:
        archive.add(folder / "pairs.jsonl", "model_config.yaml")


def _unpacked(folder: Path) -> None:
    (folder / "model/model_weights").mkdir(parents=True)


def _of_pickles(folder: Path) -> None:
    shutil.rmtree(folder / "foreign/release")
    (folder / "foreign/release/mp_rank_00").mkdir(parents=True)
    (folder / "foreign/release/mp_rank_00/model_optim_rng.pt").write_bytes(b"")


EXPORT = "tools.convert_megatron_to_hf"
ENTRIES = [
    BadInput("an archive of NeMo 1", (EXPORT, "model.nemo", "out"), f"model.nemo: {NEMO_1}", make=_archive),
    BadInput("an unpacked archive of NeMo 1", (EXPORT, "model", "out"), f"model: {NEMO_1}", make=_unpacked),
    BadInput(
        "an archive of NeMo 1 to train",
        train("model.checkpoint=model.nemo", given=("data.train=pairs.jsonl",)),
        f"model.nemo: {NEMO_1}",
        make=_archive,
    ),
    BadInput(
        "a checkpoint of another program to train",
        train("model.checkpoint=foreign", given=("data.train=pairs.jsonl",)),
        "foreign: this is a checkpoint of Megatron-LM; make a HuggingFace model of it with python -m "
        "tools.convert_megatron_to_hf foreign HF_FOLDER --like MODEL, and give that.",
        make=_made(),
    ),
    foreign(
        "no model that it was made from",
        "foreign: give with --like the HuggingFace model that this checkpoint of Megatron-LM was made from; its "
        "config.json and its tokenizer are taken.",
        like=None,
    ),
    foreign(
        "no model that it was made from, though it names one",
        "foreign: give with --like the HuggingFace model that this checkpoint of Megatron-Bridge was made from, "
        "which it "
        "says was Qwen/Qwen3-8B; its config.json and its tokenizer are taken.",
        _of_bridge(hf_model_id="Qwen/Qwen3-8B"),
        like=None,
    ),
    BadInput(
        "no model that it was made from, to convert",
        ("tools.convert_hf_to_megatron", "foreign", "out"),
        "foreign: give with --like the HuggingFace model that this checkpoint of Megatron-LM was made from; its "
        "config.json and its tokenizer are taken.",
        make=_made(),
    ),
    BadInput(
        "a model that a HuggingFace folder was made from",
        ("tools.convert_hf_to_megatron", "hf", "out", "--like", "hf"),
        "--like hf: hf has a config.json; leave --like out.",
    ),
    BadInput(
        "the model that a checkpoint of ours was made from",
        (EXPORT, "megatron", "out", "--like", "hf"),
        "--like hf: megatron has a config.json of its own; leave --like out.",
    ),
    foreign(
        "a mixture of experts of Megatron-Bridge",
        "foreign/release/run_config.yaml: num_moe_experts=8 is of a model that is not supported; supported are "
        "Gemma-2, "
        "Gemma-3, Llama, Mistral, Qwen2, Qwen3.",
        _of_bridge(num_moe_experts=8),
    ),
    foreign(
        "an architecture of Megatron-Bridge that is not supported",
        "hf/config.json: architecture 'DeepseekV3ForCausalLM' is not supported; supported: Gemma2ForCausalLM, "
        "Gemma3ForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM.",
        _of_bridge(num_layers=2),
        edit_json("hf/config.json", architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3"),
    ),
    foreign(
        "an adapter of Megatron-Bridge",
        "foreign/release/run_config.yaml: names an adapter (peft); merge it into the model first, and convert "
        "the result.",
        lambda folder: (folder / "foreign/release/run_config.yaml").write_text(
            "model: {num_layers: 2}\npeft: {dim: 8}\n"
        ),
    ),
    foreign(
        "another model's config.json",
        f"foreign/release/common.pt: num_layers=2, but for hf/config.json it would be 4; {OTHER}",
        edit_json("hf/config.json", num_hidden_layers=4),
    ),
    foreign(
        "another base of RoPE, which no shape shows",
        f"foreign/release/common.pt: rotary_base=500000.0, but for hf/config.json it would be 10000.0; {OTHER}",
        _arguments(rotary_base=500000.0),
    ),
    foreign(
        "another activation, which no shape shows",
        "foreign/release/run_config.yaml: activation_func is 'torch.nn.functional.gelu', but hf/config.json describes "
        f"silu; {OTHER}",
        _of_bridge(activation_func={"_target_": "torch.nn.functional.gelu"}),
    ),
    foreign(
        "another sliding window",
        "foreign/release/common.pt: window_size=(4096, 0), but hf/config.json describes no sliding window; " + OTHER,
        _arguments(window_size=(4096, 0)),
    ),
    foreign(
        "more rows of the vocabulary than padding explains",
        "foreign: its vocabulary has 330 rows, but hf/config.json describes 200, and padding would be fewer than 128 "
        "more; give with --like the model with the tokens that were added.",
        edit_json("hf/config.json", vocab_size=200),
        _arguments(vocab_size=None),
    ),
    foreign(
        "weights of other sizes than the settings beside them",
        "foreign: decoder.layers.0.mlp.linear_fc1.weight has shape (192, 64), but config.json describes (256, 64).",
        edit_json("hf/config.json", intermediate_size=128),
        _arguments(ffn_hidden_size=128),
    ),
    foreign(
        "weights of fewer layers than the settings beside them",
        "foreign: decoder.layers.self_attention.linear_qkv.layer_norm_weight has shape (2, 64), but hf/config.json "
        "describes 4 layers.",
        edit_json("hf/config.json", num_hidden_layers=4),
        _arguments(num_layers=4),
    ),
    foreign(
        "weights without the output matrix",
        "foreign: the weights lack output_layer.weight, which hf/config.json describes.",
        _renamed(lambda key: key.replace("output_layer.weight", "optimizer.output_layer.weight")),
    ),
    foreign(
        "weights that the model does not have",
        "foreign: decoder.layers.mlp.router.weight does not belong to the model that hf/config.json describes.",
        _renamed(lambda key: key.replace("output_layer", "decoder.layers.mlp.router")),
        edit_json("hf/config.json", tie_word_embeddings=True),
        _arguments(untie_embeddings_and_output_weights=False),
    ),
    foreign(
        "a language model inside another model",
        "foreign: the language model is the part 'language_model.' of another model, such as a multimodal one, "
        "which is "
        "not supported.",
        _renamed(lambda key: f"language_model.{key}"),
    ),
    foreign(
        "weights without word embeddings",
        "foreign: has no embedding.word_embeddings.weight, so it is no whole language model; an adapter has to "
        "be merged "
        "into its model first.",
        _renamed(lambda key: key.replace("embedding", "adapter")),
    ),
    foreign(
        "only the optimizer's state",
        "foreign: holds the state of an optimizer at most, and no weights; give the checkpoint that has them.",
        _renamed(lambda key: f"optimizer.state.exp_avg.{key}"),
    ),
    foreign(
        "another tokenizer",
        "foreign/release/tokenizer: gives 'a' and 1 more tokens another id than the tokenizer in hf; give with "
        "--like a "
        "folder that holds the tokenizer that the checkpoint was trained with.",
        _other_tokenizer,
    ),
    foreign(
        "no settings of Megatron-LM",
        "foreign/release/common.pt: no such file; the arguments of Megatron-LM belong there, which describe the model.",
        lambda folder: (folder / "foreign/release/common.pt").unlink(),
    ),
    foreign(
        "no settings of any program",
        "foreign/release: has neither run_config.yaml, as of Megatron-Bridge, nor arguments of Megatron-LM, so "
        "nobody can "
        "tell what its weights mean; put the file back that was beside them.",
        _state(lambda state: state.pop("args")),
    ),
    foreign(
        "no settings of NeMo 2",
        "foreign/context/model.yaml: no such file; the settings of the model belong there, without which nobody "
        "can tell "
        "what its weights mean.",
        _of_nemo,
    ),
    foreign(
        "settings of NeMo 2 without a model",
        "foreign/context/model.yaml: has no part 'config' with the settings of the model.",
        _of_nemo,
        _nemos_settings,
    ),
    BadInput(
        "the weights of a checkpoint of NeMo 2",
        ("tools.convert_megatron_to_hf", "foreign/weights", "out", "--like", "hf"),
        "foreign/weights: these are the weights of a checkpoint of NeMo 2; give its folder, foreign.",
        make=_made(_weights_of_nemo),
    ),
    foreign(
        "a damaged common.pt",
        "foreign/release/common.pt: the state beside the weights cannot be read (it is not a file of torch.save "
        "(File is "
        "not a zip file)).",
        cut("foreign/release/common.pt", 0.5),
    ),
    foreign(
        "a damaged index",
        "foreign/release/.metadata: the checkpoint's index is damaged (*).",
        cut("foreign/release/.metadata", 0.5),
    ),
    foreign(
        "the form zarr",
        f"foreign/release: is in the form zarr, which Megatron-Core reads no longer, nor is it here; {AGAIN}",
        edit_json("foreign/release/metadata.json", sharded_backend="zarr"),
    ),
    foreign(
        "an unknown form",
        f"foreign/release/metadata.json: does not say that the checkpoint is in the form torch_dist; {AGAIN}",
        edit_json("foreign/release/metadata.json", sharded_backend="mine"),
    ),
    foreign(
        "a pickle for each rank",
        f"foreign/release: holds a file of pickles for each rank, which is not read; {AGAIN}",
        _of_pickles,
    ),
    foreign(
        "no description of the form",
        "foreign/release: no metadata.json there, so the checkpoint is not whole, or in the form fsdp_dtensor or "
        f"torch_dcp, which is not read; {AGAIN}",
        lambda folder: (folder / "foreign/release/metadata.json").unlink(),
    ),
    foreign(
        "a checkpoint that is not whole",
        "foreign/release: no .metadata there, so the checkpoint is not whole; copy it again.",
        lambda folder: (folder / "foreign/release/.metadata").unlink(),
    ),
    foreign(
        "a file that names the newest checkpoint, with something else",
        "foreign/latest_checkpointed_iteration.txt: holds neither a number of steps nor 'release'.",
        lambda folder: (folder / "foreign/latest_checkpointed_iteration.txt").write_text("../hf"),
    ),
    foreign(
        "a newest checkpoint that is not there",
        "foreign/latest_checkpointed_iteration.txt: names iter_0000007, which is not there; give the folder of another "
        "one.",
        lambda folder: (folder / "foreign/latest_checkpointed_iteration.txt").write_text("7"),
    ),
]
