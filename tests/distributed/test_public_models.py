"""On paper: public models of 1B to 72B, too large for a test to hold, fill Megatron's parameters at every layout."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.public_models import PUBLIC_MODELS
from tgdpo_megatron.config import ParallelConfig
from tgdpo_megatron.config.constants import VOCAB_MULTIPLE
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription, check_model_layout
from tgdpo_megatron.model.families import FAMILIES, family_of, read_description

SIZES = range(1, 9)
LARGEST = ("Llama-3.3-70B", "Mistral-Small-24B", "Qwen2.5-72B", "Qwen3-32B", "Gemma-2-27B", "Gemma-3-1B")
"""Of each family, at every layout that fits; the others at the first and the last of these."""


Layout = tuple[str, int, int]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, list[list[Any]]]:
    """The shards of all stages: of a model at TP and PP sizes."""
    folder = tmp_path_factory.mktemp("public")
    wanted: list[Layout] = []
    for name, (config, _) in PUBLIC_MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        description = read_description(folder / name)
        fitting = [
            (name, tensor, pipeline) for tensor in SIZES for pipeline in SIZES if _fits(description, tensor, pipeline)
        ]
        assert len(fitting) >= 2
        wanted += fitting if name in LARGEST else [fitting[0], fitting[-1]]
    requests = folder / "requests.json"
    requests.write_text(json.dumps([[str(folder / name), *sizes] for name, *sizes in wanted]))
    command = [sys.executable, "-m", "tests.support.on_paper", str(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(wanted, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_every_parameter_of_megatron_is_filled_once_at_every_layout(
    name: str, held: dict[Layout, list[list[Any]]]
) -> None:
    """Whatever the layout: the stages together hold every key of the map and no other, once, in its shape, and a rank
    its share of it. The vocabulary is padded to a multiple of 128 on each rank."""
    config, _ = PUBLIC_MODELS[name]
    description = FAMILIES[config["model_type"]].read(config, Path("config.json"))
    maps = {tensor.key: tensor for tensor in family_of(description).tensors(description)}
    layouts = {layout: shards for layout, shards in held.items() if layout[0] == name}
    assert len(layouts) >= 2
    for (_, tensor, _), shards in layouts.items():
        assert {key for key, *_ in shards} == set(maps)
        pieces = Counter(key for key, _, _, is_copy in shards if not is_copy)
        for key, whole, local, _ in shards:
            wanted, gated = maps[key], "linear_fc1.weight" in key  # gate and up are two shards of one tensor
            assert pieces[key] == (2 if gated else 1), key
            shape = list(wanted.shape)
            if "word_embeddings" in key or "output_layer" in key:
                shape[0] = math.ceil(shape[0] / (VOCAB_MULTIPLE * tensor)) * VOCAB_MULTIPLE * tensor
            assert whole == shape, key
            if wanted.split is not None:
                shape[wanted.split] //= tensor * (2 if gated else 1)
            assert local == shape, (key, tensor)


def _fits(description: ModelDescription, tensor: int, pipeline: int) -> bool:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    try:
        check_model_layout(description, parallel)
    except UserError:
        return False
    return True
