"""Public models in Megatron at layouts, without weights: the shards of all pipeline stages, on torch's meta device, in
one process that pretends to be one rank of many after another.

    python -m tests.support.on_paper REQUESTS   a JSON list of [MODEL_FOLDER, tensor, pipeline]; prints a line for each
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tgdpo_megatron.quiet import quiet


def shards(folder: Path, tensor: int, pipeline: int) -> list[list[Any]]:
    """Key, shape of the whole, shape of the shard, and whether it is a copy of another, of every shard of the first
    tensor-parallel rank of each pipeline stage. The other ranks hold as much."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tgdpo_megatron.checkpoint.fingerprint import sharded_tensors
    from tgdpo_megatron.checkpoint.state import sharded_model_state
    from tgdpo_megatron.config import Config
    from tgdpo_megatron.model.build import build_model, transformer_config
    from tgdpo_megatron.model.families import read_description

    description = read_description(folder)
    parallel = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    config = Config.model_validate({"parallel": parallel, "train": {"precision": "fp32"}})
    found: list[list[Any]] = []
    for stage in range(pipeline):
        dist.init_process_group("fake", rank=stage * tensor, world_size=tensor * pipeline, store=FakeStore())
        parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
        with torch.device("meta"):
            chunks = build_model(description, transformer_config(description, config))
        for shard in sharded_tensors(sharded_model_state(chunks)):
            replica = shard.replica_id[0] if isinstance(shard.replica_id, tuple) else shard.replica_id
            found.append([shard.key, shard.global_shape, shard.local_shape, replica != 0])
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


def main() -> None:
    quiet()
    from tgdpo_megatron.platform import cpu

    cpu.install()
    for folder, tensor, pipeline in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(shards(Path(folder), tensor, pipeline)), flush=True)


if __name__ == "__main__":
    main()
