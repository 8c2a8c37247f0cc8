"""What is read of checkpoints of other programs beside their weights, and what is left alone."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from tests.parity.models import make_config
from tests.support.hostile import weight_as_object
from tests.support.in_process import Program
from tests.support.megatron_lm import of_megatron_lm
from tests.support.other_programs import settings_of
from tgdpo_megatron.checkpoint import jobs
from tgdpo_megatron.checkpoint.foreign.folder import LM, NEMO, find_foreign
from tgdpo_megatron.checkpoint.foreign.reading import foreign_to_hf, foreign_to_megatron
from tgdpo_megatron.checkpoint.foreign.settings import check_family, check_settings, read_settings
from tgdpo_megatron.checkpoint.foreign.writing import hf_to_bridge
from tgdpo_megatron.checkpoint.index import ForeignIndex
from tgdpo_megatron.checkpoint.manifest import read_manifest
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.families import read_description
from tools.convert_hf_to_megatron import main

OPTIONS: dict[str, Any] = {"dtype": None, "processes": 1, "certificate": False}
"""Of a conversion."""


@pytest.fixture
def written(hf_model: Path, tmp_path: Path) -> Path:
    """A checkpoint of Megatron-LM."""
    hf_to_bridge(hf_model, tmp_path / "written")
    return tmp_path / "written"


def test_arguments_are_found_where_megatron_core_puts_them_since_0_19(written: Path, hf_model: Path) -> None:
    """Among the weights, as an object, and no longer in common.pt."""
    release = written / "release"
    state = torch.load(release / "common.pt", weights_only=False)
    (release / "common.pt").unlink()
    torch.save([state], release / "__7_0.distcp")
    index = pickle.loads((release / ".metadata").read_bytes())
    key, size = "common_state/shard_0_1", (release / "__7_0.distcp").stat().st_size
    index.state_dict_metadata[key] = BytesStorageMetadata()
    index.storage_data[MetadataIndex(key)] = _StorageInfo("__7_0.distcp", 0, size)
    (release / ".metadata").write_bytes(pickle.dumps(index))

    foreign = find_foreign(written)
    assert foreign is not None and foreign.program == LM
    settings = read_settings(foreign)
    assert (settings["num_layers"], settings["layernorm_epsilon"]) == (2, state["args"].norm_epsilon)
    check_settings(settings, foreign.settings, read_description(hf_model), hf_model)


@pytest.mark.parametrize("files", [2, 20_000], ids=["of two files of data", "of 20,000 files of data"])
def test_the_arguments_of_megatron_lms_own_parser_are_read(files: int, written: Path, hf_model: Path) -> None:
    """Hundreds, with enums and dtypes among them; with many paths of data they have more than a MiB."""
    path = written / "release" / "common.pt"
    config = json.loads((hf_model / "config.json").read_text())
    paths = [f"/data/web/part-{file:05d}/tokenized/of/a/corpus_text_document" for file in range(files)]
    state = torch.load(path, weights_only=False)
    state["args"] = of_megatron_lm(config, data_path=paths)
    torch.save(state, path)
    assert len(vars(state["args"])) > 400 and (path.stat().st_size > 1024**2) == (files > 2)

    foreign = find_foreign(written)
    assert foreign is not None and foreign.program == LM
    settings = read_settings(foreign)
    check_family(settings, foreign.settings)
    check_settings(settings, foreign.settings, read_description(hf_model), hf_model)
    assert settings["attention_backend"].is_a("AttnBackend") and settings["params_dtype"].name == "bfloat16"
    with pytest.raises(UserError, match="hidden_size=64, but"):
        other = read_description(hf_model)
        check_settings(settings, foreign.settings, replace(other, hidden_size=128), hf_model)


def test_a_tensor_may_be_asked_for_again(written: Path) -> None:
    index = ForeignIndex(written / "release")
    assert index.tensor("decoder.final_layernorm.weight") == index.tensor("decoder.final_layernorm.weight")


def test_the_newest_whole_one_of_several_is_read_where_nothing_names_one(
    written: Path, hf_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (written / "release").rename(written / "iter_0000003")
    (written / "latest_checkpointed_iteration.txt").unlink()
    (written / "iter_0000005").mkdir()
    (written / "iter_0000005" / "__0_0.distcp").write_bytes(b"the first part of a sa")
    foreign = find_foreign(written)
    assert foreign is not None
    assert (foreign.weights.name, foreign.cut_short) == ("iter_0000003", written / "iter_0000005")
    foreign_to_hf(foreign, tmp_path / "hf", hf_model)
    assert f"iter_0000005: is not whole; {written / 'iter_0000003'} is read instead." in capsys.readouterr().err


def test_a_checkpoint_becomes_one_of_ours_and_nothing_else_is_left(
    written: Path, hf_model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    foreign = find_foreign(written)
    assert foreign is not None
    made = foreign_to_megatron(foreign, tmp_path / "out" / "ours", hf_model, **OPTIONS)
    assert made == read_manifest(tmp_path / "out" / "ours") == read_manifest(checkpoint)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ours"]


def test_an_interrupted_conversion_keeps_the_huggingface_folder_between_and_a_refused_one_does_not(
    written: Path, hf_model: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = find_foreign(written)
    assert foreign is not None

    def between() -> list[Path]:
        return list((tmp_path / "out").glob("ours.*.hf"))

    for error, kept in ((UserError("refused"), 0), (KeyboardInterrupt(), 1)):
        with monkeypatch.context() as patched, pytest.raises(type(error)):
            patched.setattr(jobs.ToMegatron, "write", raising(error))
            foreign_to_megatron(foreign, tmp_path / "out" / "ours", hf_model, **OPTIONS)
        assert len(between()) == kept
    with monkeypatch.context() as patched:
        patched.setattr(jobs.ToHuggingFace, "write", raising(AssertionError("the folder is there already")))
        foreign_to_megatron(foreign, tmp_path / "out" / "ours", hf_model, **OPTIONS)
    assert read_manifest(tmp_path / "out" / "ours") == read_manifest(checkpoint) and between() == []


def test_the_single_step_is_a_program_and_takes_a_huggingface_folder_with_a_metadata_json_for_one(
    written: Path, hf_model: Path, checkpoint: Path, tmp_path: Path, in_process: Program
) -> None:
    """Megatron's checkpoints have a file of that name."""
    shutil.copytree(hf_model, tmp_path / "hf")
    (tmp_path / "hf" / "metadata.json").write_text("{}")
    for name, given in {"of-foreign": [written, "--like", hf_model], "of-hf": [tmp_path / "hf"]}.items():
        source, *more = given
        code, said = in_process(main, [source, tmp_path / name, *more, "--no-certificate"])
        assert code == 0, said
        assert read_manifest(tmp_path / name) == read_manifest(checkpoint)


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that does nothing else."""

    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_a_weight_that_is_called_an_object_is_not_read(written: Path, hf_model: Path, tmp_path: Path) -> None:
    """Objects among the tensors are left alone, so such a weight is missing, and its bytes are never unpickled."""
    (written / "release").rename(written / "weights")
    (written / "context").mkdir()
    settings = settings_of(json.loads((hf_model / "config.json").read_text()))
    (written / "context" / "model.yaml").write_text(yaml.safe_dump({"config": settings}))
    weight_as_object(written, tmp_path / "ran")
    foreign = find_foreign(written)
    assert foreign is not None and foreign.program == NEMO
    with pytest.raises(UserError, match="has no embedding.word_embeddings.weight"):
        foreign_to_hf(foreign, tmp_path / "hf", hf_model)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, ""),
        ({"num_query_groups": None, "kv_channels": None, "seq_length": 1}, ""),
        ({"num_query_groups": 4}, "num_query_groups=4, but"),
        ({"share_embeddings_and_output_weights": True}, "share_embeddings_and_output_weights=True, but"),
        ({"layernorm_epsilon": 1e-3}, "layernorm_epsilon=0.001, but"),
        ({"rope_scaling": True}, "rope_scaling=True, but"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0, but"),
        ({"softmax_scale": 0.1}, "softmax_scale=0.1, but"),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm' is of a model that is not supported"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True is of a model that is not supported"),
        ({"rotary_base": [1e4, 1e6]}, "rotary_base=[10000.0, 1000000.0], but"),
        ({"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}, ""),
        ({"low_freq_factor": 2}, "low_freq_factor=2 is of a model that is not supported"),
        ({"window_size": None}, ""),
        ({"window_size": [-1, -1]}, ""),
        ({"window_size": [4096, 0]}, "describes no sliding window"),
    ],
)
def test_a_stated_setting_must_be_the_one_that_config_json_describes(
    changed: dict[str, object], refused: str, hf_model: Path, tmp_path: Path
) -> None:
    """One that is not set, or that has no plain value, says nothing."""
    settings = settings_of(json.loads((hf_model / "config.json").read_text()), **changed)
    said = ""
    try:
        check_family(settings, tmp_path)
        check_settings(settings, tmp_path, read_description(hf_model), hf_model)
    except UserError as error:
        said = str(error)
    assert refused in said and bool(refused) == bool(said)


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, ""),
        ({"rotary_base": [1e4, 5e5]}, "rotary_base=[10000.0, 500000.0], but"),
        ({"rope_scaling_factor": 1.0}, "rope_scaling_factor=1.0, but"),
        ({"window_size": [8, 0]}, ""),
        ({"window_size": [7, 0]}, ""),
        ({"window_size": [16, 0]}, "window_size=[16, 0], but"),
        ({"window_size": 512}, "describes a sliding window of 8 tokens"),
    ],
)
def test_windows_and_pairs_of_bases_are_compared(changed: dict[str, object], refused: str, tmp_path: Path) -> None:
    """As Megatron-Bridge's class for Gemma-3 has them: 8 tokens, bases of windowed and of full layers, a factor."""
    make_config("gemma3_text", tied=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    of_gemma3 = {"qk_layernorm": True, "rotary_base": [1e4, 1e6], "rope_scaling_factor": 8.0, "window_size": 8}
    settings = settings_of(config, **{**of_gemma3, **changed})
    said = ""
    try:
        check_settings(settings, tmp_path, read_description(tmp_path), tmp_path)
    except UserError as error:
        said = str(error)
    assert refused in said and bool(refused) == bool(said)
