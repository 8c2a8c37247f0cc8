"""On paper: public models of 1B to 72B, too large for a test to hold, fill Megatron's parameters at every layout."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.public_models import PUBLIC_MODELS
from tgdpo_megatron.config import ParallelConfig
from tgdpo_megatron.config.constants import VOCAB_MULTIPLE
from tgdpo_megatron.errors import UserError
from tgdpo_megatron.model.description import ModelDescription, check_model_layout
from tgdpo_megatron.model.families import family_of, read_description

SIZES = (1, 2, 4, 8)
LARGEST = ("Llama-3.3-70B", "Mistral-Small-24B", "Qwen2.5-72B", "Qwen3-32B", "Gemma-2-27B", "Gemma-3-1B")
"""Of each family, at every layout that fits; the others at the first and the last of these."""


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_every_parameter_of_megatron_is_filled_once_at_every_layout(name: str, tmp_path: Path) -> None:
    """Whatever the layout: the stages together hold every key of the map and no other, once, in its shape, and a rank
    its share of it. The vocabulary is padded to a multiple of 128 on each rank."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC_MODELS[name][0]))
    description = read_description(tmp_path)
    layouts = [(tensor, pipeline) for tensor in SIZES for pipeline in SIZES if _fits(description, tensor, pipeline)]
    assert len(layouts) >= 2
    if name not in LARGEST:
        layouts = [layouts[0], layouts[-1]]
    names = [f"{tensor}×{pipeline}" for tensor, pipeline in layouts]
    command = [sys.executable, "-m", "tests.support.on_paper", str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    maps = {tensor.key: tensor for tensor in family_of(description).tensors(description)}
    for (tensor, _), line in zip(layouts, done.stdout.splitlines(), strict=True):
        shards = json.loads(line)
        assert {shard["key"] for shard in shards} == set(maps)
        for rank in {0, tensor - 1}:
            mine = [shard for shard in shards if shard["rank"] == rank]
            pieces = Counter(shard["key"] for shard in mine if not (rank == 0 and shard["copy"]))
            for key, wanted in maps.items():
                # Gate and up are two shards of one tensor.
                of_key = [shard for shard in mine if shard["key"] == key]
                if rank == 0:
                    assert pieces[key] == len(wanted.names) if "linear_fc1.weight" in key else pieces[key] == 1, key
                shape = list(wanted.shape)
                if "word_embeddings" in key or "output_layer" in key:
                    multiple = VOCAB_MULTIPLE * tensor
                    shape[0] = math.ceil(shape[0] / multiple) * multiple
                assert all(shard["shape"] == shape for shard in of_key), key
                if wanted.split is not None:
                    shape[wanted.split] //= tensor * (2 if "linear_fc1.weight" in key else 1)
                assert all(shard["local"] == shape for shard in of_key), (key, tensor)


def _fits(description: ModelDescription, tensor: int, pipeline: int) -> bool:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    try:
        check_model_layout(description, parallel)
    except UserError:
        return False
    return True
