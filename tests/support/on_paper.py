"""A public model in Megatron at a layout, without weights: the shards that all pipeline stages hold, on torch's meta
device, in one process that pretends to be one rank of many after another.

    python -m tests.support.on_paper MODEL_FOLDER TENSOR×PIPELINE ...   prints a JSON list of shards for each layout
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tgdpo_megatron.quiet import quiet


def shards(folder: Path, tensor: int, pipeline: int) -> list[dict[str, Any]]:
    """Every shard of the first and of the last tensor-parallel rank of each pipeline stage."""
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
    found = []
    for stage in range(pipeline):
        for place in {0, tensor - 1}:
            dist.init_process_group(
                "fake", rank=stage * tensor + place, world_size=tensor * pipeline, store=FakeStore()
            )
            parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
            with torch.device("meta"):
                chunks = build_model(description, transformer_config(description, config))
            found += [
                {
                    "key": shard.key,
                    "stage": stage,
                    "rank": place,
                    "shape": shard.global_shape,
                    "local": shard.local_shape,
                    "copy": shard.replica_id[0] != 0 if isinstance(shard.replica_id, tuple) else shard.replica_id != 0,
                }
                for shard in sharded_tensors(sharded_model_state(chunks))
            ]
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return found


def main() -> None:
    quiet()
    from tgdpo_megatron.platform import cpu

    cpu.install()
    folder, *layouts = sys.argv[1:]
    for layout in layouts:
        tensor, pipeline = map(int, layout.split("×"))
        print(json.dumps(shards(Path(folder), tensor, pipeline)), flush=True)


if __name__ == "__main__":
    main()
