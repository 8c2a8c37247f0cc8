"""On paper: public models from 1B to 72B, whose weights no test could hold, have HuggingFace's tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.public_models import PUBLIC_MODELS
from tgdpo_megatron.model.description import ModelDescription
from tgdpo_megatron.model.families import family_of, parameters, read_description


@pytest.fixture(params=PUBLIC_MODELS)
def public(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, ModelDescription]:
    """The name of a public model, a folder with its config.json, and its shape."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC_MODELS[request.param][0]))
    return request.param, tmp_path, read_description(tmp_path)


def test_the_number_of_parameters_is_the_published_one(public: Any) -> None:
    name, _, description = public
    assert parameters(description) == PUBLIC_MODELS[name][1]


def test_every_tensor_of_huggingface_is_consumed_once_with_its_shape(public: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    _, folder, description = public
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # tied ones once
    maps = family_of(description).tensors(description)
    ours = [(name, shape) for tensor in maps for name, shape in zip(tensor.names, tensor.shapes, strict=True)]
    assert dict(ours) == theirs
    assert len(ours) == len(theirs)


def test_the_planner_counts_the_published_parameters(public: Any) -> None:
    """Over two pipeline stages, with the padding of the vocabulary taken away again."""
    from tgdpo_megatron.config import Config
    from tgdpo_megatron.planning.sizes import Sizes

    name, _, description = public
    config = Config.model_validate({"parallel": {"pipeline_model_parallel_size": 2}})
    sizes = Sizes(config, description, "train", 2)
    matrices = 2  # a tied embedding is on the last stage as well
    padding = matrices * (sizes.padded_vocabulary - description.vocab_size) * description.hidden_size
    copy = description.vocab_size * description.hidden_size if description.tie_word_embeddings else 0
    assert sum(map(sizes.parameters, range(2))) - padding - copy == PUBLIC_MODELS[name][1]
