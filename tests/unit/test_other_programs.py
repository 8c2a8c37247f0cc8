"""What is read of checkpoints of other programs beside their weights, and what is left alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from tests.support.hostile import weight_as_object
from tests.support.other_programs import settings_of
from tgdpo_megatron.checkpoint.foreign.folder import LM, NEMO, find_foreign
from tgdpo_megatron.checkpoint.foreign.reading import foreign_to_hf
from tgdpo_megatron.checkpoint.foreign.settings import check_family, check_settings, read_settings
from tgdpo_megatron.checkpoint.foreign.writing import hf_to_bridge
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.families import read_description


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
        ({"rotary_base": [1e4, 1e6]}, ""),
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
