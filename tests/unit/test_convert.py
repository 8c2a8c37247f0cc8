"""The converter: bit-equal round trips, one fingerprint for one set of weights, whole or nothing."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tgdpo_megatron.checkpoint import convert, jobs
from tgdpo_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from tgdpo_megatron.checkpoint.fingerprint import _BLOCK, all_finite, combine, tensor_sum
from tgdpo_megatron.checkpoint.foreign.folder import find_foreign
from tgdpo_megatron.checkpoint.foreign.reading import foreign_to_hf
from tgdpo_megatron.checkpoint.foreign.writing import hf_to_bridge
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.checkpoint.work import work_on
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import read_description
from tgdpo_megatron.model.tensor_maps import TensorMap, by_group, same, stacked

LAST = "model.layers.1.mlp.down_proj.weight"


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a HuggingFace folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def copy_with(source: Path, target: Path, *, dtype: torch.dtype | None = None, **changed: Tensor) -> Path:
    """A HuggingFace folder with some tensors changed (dots written as __), or all in another dtype."""
    shutil.copytree(source, target)
    weights = weights_of(source) | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def untouched(parent: Path, *expected: str) -> None:
    """Nothing but `expected` lies in a folder, hidden files included."""
    assert sorted(path.name for path in parent.iterdir()) == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "head_dim": 32}],
    ids=["grouped queries", "tied", "one key per query", "one key for all, wide heads"],
)
def test_a_round_trip_is_bit_equal(
    shape: Any, dtype: torch.dtype, make_hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = copy_with(make_hf_model(tmp_path / "made", **shape), tmp_path / "hf", dtype=dtype)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_bit_equal(weights_of(tmp_path / "back"), weights_of(source))


def test_a_round_trip_keeps_config_and_tokenizer(hf_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    megatron_to_hf(checkpoint, tmp_path / "back")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (hf_model, tmp_path / "back"))
    assert before == after
    text = "The capital of France, 12 times."
    ids = [AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"] for folder in (hf_model, tmp_path / "back")]
    assert ids[0] == ids[1]


def test_the_exported_model_gives_the_same_logits(hf_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    megatron_to_hf(checkpoint, tmp_path / "back")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(str(folder))(tokens).logits for folder in (hf_model, tmp_path / "back")
        ]
    assert torch.equal(logits[0], logits[1])


def test_shards_with_an_index_give_the_same_checkpoint(hf_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = weights_of(hf_model)
    names = sorted(weights)
    files = {name: f"model-{number % 3 + 1:05d}-of-00003.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, tmp_path / "hf" / file)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert found.weights == read_manifest(checkpoint).weights


def test_an_export_larger_than_a_shard_gets_an_index(
    checkpoint: Path, hf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from tgdpo_megatron.checkpoint import safetensors

    monkeypatch.setattr(safetensors, "SHARD_BYTES", 100_000)
    megatron_to_hf(checkpoint, tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert_bit_equal(weights_of(tmp_path / "back"), weights_of(hf_model))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "back")).state_dict()
    assert torch.equal(loaded[LAST], weights_of(hf_model)[LAST])


def test_rounding_to_bf16_is_torchs(hf_model: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf_model, tmp_path / "megatron", dtype="bf16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in weights_of(hf_model).items()}
    assert_bit_equal(weights_of(tmp_path / "back"), expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_tensor_keeps_its_own_dtype(hf_model: Path, tmp_path: Path) -> None:
    """Norms in fp32, an odd number of bf16 numbers before them, the rest in fp16; and every tensor aligned."""
    wanted = {"norm.weight": torch.float32, "layernorm.weight": torch.float32, "embed_tokens.weight": torch.bfloat16}
    weights = {
        name: tensor.to(next((dtype for end, dtype in wanted.items() if name.endswith(end)), torch.float16))
        for name, tensor in weights_of(hf_model).items()
    }
    source = copy_with(hf_model, tmp_path / "hf", **weights)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_bit_equal(weights_of(tmp_path / "back"), weights)
    content = (tmp_path / "back" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % weights[name].itemsize == 0, name


@pytest.mark.parametrize("processes", [1, 2])
def test_small_blocks_in_many_parts_give_the_same_weights(
    processes: int, checkpoint: Path, hf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a tensor in several blocks, blocks in several files, files by several processes."""
    monkeypatch.setattr(convert, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(jobs, "PART_ELEMENTS", 40_000)
    found = hf_to_megatron(hf_model, tmp_path / "megatron", processes=processes)
    assert found == read_manifest(checkpoint)
    assert len(list((tmp_path / "megatron" / "weights").glob("*.distcp"))) > 2
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", processes=processes)
    assert_bit_equal(weights_of(tmp_path / "back"), weights_of(hf_model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "megatron"]


@pytest.mark.parametrize("most", [1, 5, 8, 1000])
@pytest.mark.parametrize(
    "tensor",
    [
        same("k", "a", (7, 3)),
        same("k", "a", (7,)),
        stacked("k", ("a", "b"), ((7, 3), (4, 3))),
        by_group("k", ("q", "k", "v"), ((12, 3), (6, 3), (6, 3)), groups=3),
        by_group("k", ("q", "k", "v"), ((12,), (6,), (6,)), groups=3),
    ],
    ids=["same", "vector", "stacked", "by group", "vectors by group"],
)
def test_blocks_of_a_tensor_join_to_what_the_tensor_joins_to(tensor: TensorMap, most: int) -> None:
    parts = [
        torch.randn(shape, generator=torch.Generator().manual_seed(place)) for place, shape in enumerate(tensor.shapes)
    ]
    by_name = dict(zip(tensor.names, parts, strict=True))
    whole, back = torch.empty(tensor.shape), {name: torch.empty_like(part) for name, part in by_name.items()}
    filled = 0
    for block in tensor.blocks(most):
        rows, shapes = block.tensor.shape[0], block.tensor.shapes
        cut = [
            by_name[name][first : first + shape[0]]
            for name, first, shape in zip(block.tensor.names, block.firsts, shapes, strict=True)
        ]
        joined = block.tensor.join(cut)
        assert joined.shape == block.tensor.shape and block.first == filled and rows <= max(most, 8)
        whole[block.first : block.first + rows] = joined
        filled += rows
        for name, first, part in zip(block.tensor.names, block.firsts, block.tensor.part(joined), strict=True):
            back[name][first : first + len(part)] = part
    assert filled == tensor.shape[0] and torch.equal(whole, tensor.join(parts))
    assert all(torch.equal(back[name], part) for name, part in by_name.items())


# ---------------------------------------------------------------- what an export is


def test_a_tied_export_has_no_output_layer_and_loads_tied(make_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf_to_megatron(make_hf_model(tmp_path / "hf", tie_word_embeddings=True), tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert "lm_head.weight" not in weights_of(tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_export_has_all_that_servers_look_for(
    checkpoint: Path, hf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and keys by transformers' and vLLM's conventions, in shards, with nothing beside them."""
    from transformers import AutoTokenizer, GenerationConfig

    from tgdpo_megatron.checkpoint import safetensors

    monkeypatch.setattr(safetensors, "SHARD_BYTES", 200_000)
    megatron_to_hf(checkpoint, tmp_path / "back", dtype="bf16")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    assert shards == [f"model-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)]
    assert names - set(shards) == {path.name for path in hf_model.iterdir()} - {"model.safetensors"} | {
        "model.safetensors.index.json"
    }
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    tensors = {shard: load_file(tmp_path / "back" / shard) for shard in shards}
    assert index["weight_map"] == {name: shard for shard in shards for name in tensors[shard]}
    assert index["metadata"]["total_size"] == sum(one.nbytes for shard in shards for one in tensors[shard].values())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (hf_model, tmp_path / "back"))
    assert before.chat_template == after.chat_template and after.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == before.eos_token_id


def test_a_config_of_older_transformers_names_the_dtype_in_its_own_way_too(hf_model: Path, tmp_path: Path) -> None:
    """An older reader knows torch_dtype alone; and a config need not name the architecture."""
    shutil.copytree(hf_model, tmp_path / "hf")
    config = json.loads((hf_model / "config.json").read_text())
    del config["dtype"], config["architectures"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", dtype="bf16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (after["dtype"], after["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert after["architectures"] == ["LlamaForCausalLM"]


# ---------------------------------------------------------------- fingerprints


def test_a_sum_is_what_its_definition_says() -> None:
    """By Python's own integers: bits, times an odd number of the row, times another of the column, modulo 2^64."""

    def odd(place: int, kind: int) -> int:
        mixed = (4 * place + kind) * -7046029254386353131 + 1442695040888963407
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            mixed = (mixed + 2**63) % 2**64 - 2**63  # as a signed number of 64 bits, whose shift keeps the sign
            mixed = (mixed ^ (mixed >> shift)) * factor
        return mixed | 1

    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    bits = tensor.view(torch.int32).tolist()
    expected = sum(bits[row][column] * odd(row + 4, 1) * odd(column + 9, 2) for row in range(3) for column in range(5))
    assert tensor_sum(tensor, offset=[4, 9]) == expected % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_flipped_bit_changes_the_sum(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    sums = {tensor_sum(tensor, offset=[0, 0])}
    for element in range(tensor.numel()):
        for bit in range(8 * tensor.itemsize):
            flipped = tensor.clone().flatten()
            flipped.view(integers)[element] ^= torch.tensor(2**bit, dtype=torch.int64).to(integers)
            sums.add(tensor_sum(flipped.view(3, 5), offset=[0, 0]))
    assert len(sums) == 1 + tensor.numel() * 8 * tensor.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_values_have_equal_sums_in_every_dtype(dtype: torch.dtype) -> None:
    values = torch.randint(-8, 8, (6, 10), generator=torch.Generator().manual_seed(0)).float() / 4
    expected = tensor_sum(values, offset=[0, 0])
    for rounded_to in (torch.float32, torch.bfloat16):
        assert tensor_sum(values.to(dtype), offset=[0, 0], rounded_to=rounded_to) == expected


def test_columns_exchanged_and_a_matrix_transposed_have_other_sums() -> None:
    tensor = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    others = (tensor, tensor.roll(1, 1), tensor.roll(1, 0), tensor.T, tensor.flip(0, 1))
    assert len({tensor_sum(other, offset=[0, 0]) for other in others}) == len(others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_finite_though_their_sum_overflows(dtype: torch.dtype) -> None:
    tensor = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(tensor)
    for value in ("nan", "inf", "-inf"):
        tensor[5] = float(value)
        assert not all_finite(tensor)
    tensor[6] = float("inf")
    assert not all_finite(tensor), "infinities of both signs"


def test_a_fingerprint_survives_the_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    megatron_to_hf(checkpoint, tmp_path / "back")
    assert hf_to_megatron(tmp_path / "back", tmp_path / "again").weights == read_manifest(checkpoint).weights


def test_one_flipped_bit_changes_the_fingerprint(hf_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    tensor = weights_of(hf_model)[LAST].clone()
    tensor.view(torch.int32)[7, 11] ^= 1
    copy = copy_with(hf_model, tmp_path / "hf", **{LAST: tensor})
    assert hf_to_megatron(copy, tmp_path / "megatron").weights != read_manifest(checkpoint).weights


def test_two_exchanged_rows_change_the_fingerprint(hf_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    tensor = weights_of(hf_model)[LAST][torch.arange(64).roll(1)].clone()
    copy = copy_with(hf_model, tmp_path / "hf", **{LAST: tensor})
    assert hf_to_megatron(copy, tmp_path / "megatron").weights != read_manifest(checkpoint).weights


def test_storing_bf16_weights_in_fp32_keeps_the_fingerprint(hf_model: Path, tmp_path: Path) -> None:
    narrow = copy_with(hf_model, tmp_path / "hf", dtype=torch.bfloat16)
    as_stored = hf_to_megatron(narrow, tmp_path / "bf16")
    widened = hf_to_megatron(narrow, tmp_path / "fp32", dtype="fp32")
    assert (as_stored.dtype, widened.dtype) == ("bfloat16", "float32")
    assert as_stored.weights == widened.weights


@pytest.mark.parametrize("cut", [0, 1])
def test_the_sum_of_shards_is_the_sum_of_the_whole(cut: int) -> None:
    whole = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    shards = whole.split(4, dim=cut)
    parts = [tensor_sum(shard, offset=[place * 4 * (1 - cut), place * 4 * cut]) for place, shard in enumerate(shards)]
    assert sum(parts) % 2**64 == tensor_sum(whole, offset=[0, 0])


def test_the_sum_of_a_tensor_that_is_hashed_block_by_block_is_that_of_its_blocks() -> None:
    """Three blocks at once, against each alone at its own place."""
    rows = _BLOCK["cpu"] // 1024
    whole = torch.randn(3 * rows, 1024, generator=torch.Generator().manual_seed(0))
    parts = [tensor_sum(whole[first : first + rows], offset=[first, 0]) for first in (0, rows, 2 * rows)]
    assert sum(parts) % 2**64 == tensor_sum(whole, offset=[0, 0])


@pytest.mark.parametrize("field", [field.name for field in fields(ModelDescription)])
def test_the_same_tensors_computed_with_otherwise_have_another_fingerprint(field: str, hf_model: Path) -> None:
    """But for the number of positions, which changes nothing that is computed."""
    description = read_description(hf_model)
    value = getattr(description, field)
    other = replace(description, **{field: not value if isinstance(value, bool) else (value or 8) * 2})
    same = combine({"a": 1, "b": 2}, other) == combine({"a": 1, "b": 2}, description)
    assert same == (field == "max_position_embeddings")


def test_the_same_tensors_with_another_rope_are_another_model(hf_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
    found, before = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron"), read_manifest(checkpoint)
    assert found.weights != before.weights and found.weights_bf16 != before.weights_bf16


# ---------------------------------------------------------------- refusals leave nothing


def refuses(source: Path, target: Path, words: str) -> None:
    """The conversion is refused in one line with these words, and its folder holds nothing new."""
    before = sorted(path.name for path in target.parent.iterdir())
    with pytest.raises(UserError) as refused:
        hf_to_megatron(source, target)
    assert words in str(refused.value) and "\n" not in str(refused.value), str(refused.value)
    untouched(target.parent, *before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, hf_model: Path, tmp_path: Path) -> None:
    tensor = weights_of(hf_model)[LAST].clone()
    tensor[3, 5] = value
    copy = copy_with(hf_model, tmp_path / "hf", **{LAST: tensor})
    refuses(copy, tmp_path / "megatron", f"{LAST} holds numbers that are not finite")


def test_a_folder_without_weights_is_refused(hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    refuses(tmp_path / "hf", tmp_path / "megatron", "no weights there")


def test_pickled_weights_are_not_read(hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights_of(hf_model), tmp_path / "hf" / "pytorch_model.bin")
    refuses(tmp_path / "hf", tmp_path / "megatron", "would have to be unpickled")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_refused_by_name(keep: int, hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf")
    shard = tmp_path / "hf" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refuses(tmp_path / "hf", tmp_path / "megatron", "model.safetensors: this weight shard is damaged or truncated")


def one_shard(hf_model: Path, folder: Path) -> None:
    """The model with its weights in a shard, for which an index is needed."""
    shutil.copytree(hf_model, folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def test_a_missing_shard_is_refused_by_name(hf_model: Path, tmp_path: Path) -> None:
    one_shard(hf_model, tmp_path / "hf")
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors", LAST: "model-2.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(tmp_path / "hf", tmp_path / "megatron", "model-2.safetensors: this weight shard is missing")


def test_an_index_that_names_a_tensor_that_its_shard_lacks_is_refused(hf_model: Path, tmp_path: Path) -> None:
    one_shard(hf_model, tmp_path / "hf")
    index = {"weight_map": dict.fromkeys([*weights_of(hf_model), "model.layers.9.norm"], "model-1.safetensors")}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    words = "model-1.safetensors: the index says that this shard holds model.layers.9.norm, but it does not"
    refuses(tmp_path / "hf", tmp_path / "megatron", words)


def test_an_index_that_names_a_tensor_twice_is_refused(hf_model: Path, tmp_path: Path) -> None:
    one_shard(hf_model, tmp_path / "hf")
    twice = '{"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}}'
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(twice)
    refuses(tmp_path / "hf", tmp_path / "megatron", "model.safetensors.index.json: the index names a twice")


def rewrite_header(shard: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the header of a shard, its length included."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length])
    shard.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def test_a_shard_that_names_a_tensor_twice_is_refused(hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf")
    shard = tmp_path / "hf" / "model.safetensors"
    entry = b'"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,256]},'
    rewrite_header(shard, lambda header: b"{" + entry + header[1:])
    refuses(
        tmp_path / "hf", tmp_path / "megatron", "model.safetensors: this weight shard holds model.norm.weight twice"
    )


@pytest.mark.parametrize("length", [0, 10**9, 2**63, 2**64 - 1])
def test_an_absurd_length_of_a_header_is_refused(length: int, hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf")
    shard = tmp_path / "hf" / "model.safetensors"
    shard.write_bytes(length.to_bytes(8, "little") + shard.read_bytes()[8:])
    refuses(tmp_path / "hf", tmp_path / "megatron", "model.safetensors: this weight shard is damaged or truncated")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_weights_whose_dtype_says_that_they_are_quantised_are_refused(
    dtype: torch.dtype, hf_model: Path, tmp_path: Path
) -> None:
    copy = copy_with(hf_model, tmp_path / "hf", **{LAST: weights_of(hf_model)[LAST].to(dtype)})
    refuses(copy, tmp_path / "megatron", f"{LAST} is stored as ")
    with pytest.raises(UserError, match="quantised; use a bf16 or fp32 copy of the model"):
        hf_to_megatron(copy, tmp_path / "megatron")


def test_weights_in_double_precision_are_refused(hf_model: Path, tmp_path: Path) -> None:
    copy = copy_with(hf_model, tmp_path / "hf", **{LAST: weights_of(hf_model)[LAST].double()})
    refuses(copy, tmp_path / "megatron", f"{LAST} is stored as F64; only BF16, F16, F32 are converted")


def test_tensors_of_another_model_are_refused_by_name(hf_model: Path, tmp_path: Path) -> None:
    extra = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(64) for layer in range(2)}
    copy = copy_with(hf_model, tmp_path / "hf", **extra)
    words = "model.layers.0.self_attn.q_proj.bias, and 1 more does not belong to the model"
    refuses(copy, tmp_path / "megatron", words)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        "[" * 10**5,
        '{"weight_map": {"a": "../elsewhere.safetensors"}}',
    ],
)
def test_a_damaged_index_is_refused(content: str, hf_model: Path, tmp_path: Path) -> None:
    one_shard(hf_model, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(content)
    refuses(tmp_path / "hf", tmp_path / "megatron", "model.safetensors.index.json")


def test_a_missing_tensor_is_refused_by_name(hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf")
    weights = weights_of(hf_model)
    del weights[LAST]
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    refuses(tmp_path / "hf", tmp_path / "megatron", f"the weights lack the tensor {LAST}")


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(hf_model: Path, tmp_path: Path) -> None:
    copy = copy_with(hf_model, tmp_path / "hf", **{LAST: torch.zeros(64, 95)})
    refuses(copy, tmp_path / "megatron", f"{LAST} has shape (64, 95), but config.json describes (64, 96)")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
            "architecture 'Phi3ForCausalLM' is not supported",
        ),
        ({"architectures": "MambaForCausalLM"}, "architecture 'MambaForCausalLM' is not supported"),
        ({"rope_parameters": {"rope_theta": int("9" * 400)}}, "holds an integer of 400 digits"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "RoPE scaling"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_an_unsupported_model_is_refused(changes: Any, words: str, hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf")
    config = json.loads((hf_model / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    refuses(tmp_path / "hf", tmp_path / "megatron", words)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    make_hf_model: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    """Its ids would index past the embedding, in the middle of training."""
    make_hf_model(tmp_path / "hf")
    tokenizer_of_another = copy.deepcopy(tokenizer)
    tokenizer_of_another.add_tokens([f"<extra{number}>" for number in range(9)])
    tokenizer_of_another.save_pretrained(tmp_path / "hf")
    refuses(tmp_path / "hf", tmp_path / "megatron", "tokenizer")


def test_a_config_that_is_not_json_names_the_line(hf_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_model, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{\n"model_type": "llama",\n"vocab_size": }\n')
    refuses(tmp_path / "hf", tmp_path / "megatron", "config.json line 3: not valid JSON")


def test_a_target_in_use_is_left_as_it_was(hf_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    refuses(hf_model, target, "already there and not empty")
    assert (target / "precious.txt").read_text() == "mine"


def test_a_target_below_a_file_is_refused(hf_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        hf_to_megatron(hf_model, tmp_path / "file" / "megatron")


# ---------------------------------------------------------------- going on where another call was


def test_a_source_that_changed_in_between_is_converted_anew(
    hf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted after two parts; then the last weight is another, which the first two parts did not hold."""
    monkeypatch.setattr(jobs, "PART_ELEMENTS", 20_000)
    write = jobs.ToMegatron.write

    def interrupted(job: jobs.ToMegatron, part: int) -> dict[str, Any]:
        if part == 2:
            raise KeyboardInterrupt
        return write(job, part)

    source = tmp_path / "hf"
    shutil.copytree(hf_model, source)
    monkeypatch.setattr(jobs.ToMegatron, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(source, tmp_path / "megatron")
    untouched(tmp_path, "hf", "megatron.partial")
    monkeypatch.setattr(jobs.ToMegatron, "write", write)
    changed = weights_of(hf_model)[LAST] * 2
    shutil.rmtree(source)
    copy_with(hf_model, source, **{LAST: changed})
    hf_to_megatron(source, tmp_path / "megatron")
    assert "unfinished, but of another model, dtype or version of the program" in capsys.readouterr().err
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_bit_equal(weights_of(tmp_path / "back"), weights_of(source))


def test_a_target_that_another_call_works_on_is_refused_and_free_after(hf_model: Path, tmp_path: Path) -> None:
    with work_on(tmp_path / "megatron", {}):
        refuses(hf_model, tmp_path / "megatron", "megatron: another conversion to this folder is running")
    hf_to_megatron(hf_model, tmp_path / "megatron")
    untouched(tmp_path, "megatron")


# ---------------------------------------------------------------- exporting what is damaged


def test_a_checkpoint_whose_weights_were_altered_is_not_exported(
    checkpoint: Path, hf_model: Path, tmp_path: Path
) -> None:
    """One bit, behind our back: every number is finite, and torch reads the file as before."""
    tensor = weights_of(hf_model)[LAST]
    altered = tensor.clone()
    altered.view(torch.int32)[0, 0] ^= 1
    damaged = overwrite(checkpoint, tmp_path / "megatron", tensor, altered)
    with pytest.raises(UserError, match="the weights are not those that the manifest names"):
        megatron_to_hf(damaged, tmp_path / "back")
    untouched(tmp_path, "megatron")


def test_a_checkpoint_of_another_shape_than_its_config_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "megatron")
    path = tmp_path / "megatron" / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(
        UserError, match=r"linear_fc1.weight has shape \(192, 64\), but config.json describes \(256, 64\)"
    ):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    untouched(tmp_path, "megatron")


def overwrite(checkpoint: Path, target: Path, tensor: Tensor, changed: Tensor) -> Path:
    """A copy of a checkpoint in whose files the bytes of one tensor are replaced, without any other trace."""
    shutil.copytree(checkpoint, target)
    before, after = tensor.numpy().tobytes(), changed.numpy().tobytes()
    (file,) = (path for path in (target / "weights").glob("*.distcp") if before in path.read_bytes())
    file.write_bytes(file.read_bytes().replace(before, after))
    return target


def test_a_checkpoint_that_is_not_finite_is_not_exported(checkpoint: Path, hf_model: Path, tmp_path: Path) -> None:
    tensor = weights_of(hf_model)[LAST]
    broken = tensor.clone()
    broken[0, 0] = float("nan")
    damaged = overwrite(checkpoint, tmp_path / "megatron", tensor, broken)
    with pytest.raises(UserError, match="holds numbers that are not finite; the checkpoint is not exported"):
        megatron_to_hf(damaged, tmp_path / "back")
    untouched(tmp_path, "megatron")


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_truncated_checkpoint_is_not_exported(keep: int, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "megatron")
    file = max((tmp_path / "megatron" / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="cannot be read") as refused:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert "\n" not in str(refused.value)
    untouched(tmp_path, "megatron")


@pytest.mark.parametrize("content", [b"", b"not a pickle"])
def test_damaged_checkpoint_metadata_is_refused(content: bytes, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "megatron")
    (tmp_path / "megatron" / "weights" / ".metadata").write_bytes(content)
    with pytest.raises(UserError):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    untouched(tmp_path, "megatron")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("manifest.json", "nor a Megatron checkpoint of this project"),
        ("weights/.metadata", "the checkpoint has no weights"),
        ("hf/config.json", "no config.json there"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(missing: str, words: str, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "megatron")
    (tmp_path / "megatron" / missing).unlink()
    with pytest.raises(UserError, match=words):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    untouched(tmp_path, "megatron")


def test_a_huggingface_folder_is_told_how_to_become_a_checkpoint(hf_model: Path) -> None:
    with pytest.raises(UserError, match="python -m tools.convert_hf_to_megatron HF_FOLDER MEGATRON_FOLDER"):
        read_manifest(hf_model)


def test_a_description_names_the_family_whose_file_read_it(hf_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family's file need not say its own name a second time."""
    from dataclasses import replace

    from tgdpo_megatron.model import families

    monkeypatch.setitem(families.FAMILIES, "llama", replace(families.FAMILIES["llama"], name="copied"))
    assert read_description(hf_model).family == "copied"


# ---------------------------------------------------------------- what transformers would read


def test_an_output_matrix_that_is_not_the_embedding_of_a_tied_model_is_refused(
    make_hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers would keep the matrix that is stored. One that is the embedding may be stored as well."""
    source = make_hf_model(tmp_path / "hf", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(source, tmp_path / "megatron")
    weights["lm_head.weight"][7, 3] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    refuses(
        source, tmp_path / "again", "lm_head.weight is not model.embed_tokens.weight, although config.json ties them"
    )


def test_one_whole_file_is_read_before_shards_that_lie_beside_it(
    make_hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As transformers reads it: a newer model.safetensors beside the shards of an older model."""
    from transformers import AutoModelForCausalLM

    source, older = make_hf_model(tmp_path / "hf"), make_hf_model(tmp_path / "older", seed=9)
    AutoModelForCausalLM.from_pretrained(older).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, source / path.name)
    assert (source / "model.safetensors.index.json").is_file()
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(theirs[name], x) for name, x in load_file(tmp_path / "back" / "model.safetensors").items())


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_what_megatron_bridge_is_given_comes_back_bit_for_bit(
    dtype: str | None, hf_model: Path, tmp_path: Path
) -> None:
    hf_to_bridge(hf_model, tmp_path / "bridge", dtype=dtype, processes=2)
    foreign = find_foreign(tmp_path / "bridge")
    assert foreign is not None
    foreign_to_hf(foreign, tmp_path / "back", hf_model, processes=2)
    before = weights_of(hf_model)
    assert_bit_equal(weights_of(tmp_path / "back"), {n: t.bfloat16() if dtype else t for n, t in before.items()})


def test_only_the_vocabulary_may_have_rows_of_padding(checkpoint: Path, tmp_path: Path) -> None:
    """A tensor with other rows too many is another model's."""
    shutil.copytree(checkpoint, tmp_path / "megatron")
    config = tmp_path / "megatron" / "hf" / "config.json"
    fewer = json.loads(config.read_text()) | {"intermediate_size": 64}
    config.write_text(json.dumps(fewer))
    with pytest.raises(UserError, match=r"linear_fc1.weight has shape \(192, 64\), but config.json describes"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
