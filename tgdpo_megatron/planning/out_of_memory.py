"""The message when memory runs out: what the configuration needs, what the rank can have, and what would help."""

from __future__ import annotations

import contextlib
import os
import resource
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from tgdpo_megatron.checkpoint import sources
from tgdpo_megatron.checkpoint.manifest import describe
from tgdpo_megatron.config import Config
from tgdpo_megatron.errors import UserError, ran_out_of_memory
from tgdpo_megatron.model.build import HAVE_TRANSFORMER_ENGINE
from tgdpo_megatron.planning.load import Program
from tgdpo_megatron.planning.memory import plan, size
from tgdpo_megatron.planning.remedies import remedies
from tgdpo_megatron.platform.processes import Ranks


@contextlib.contextmanager
def explained(program: Program, config: Config, ranks: Ranks) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a sentence.

    Raises:
        UserError: Memory ran out. The sentence holds the planner's numbers and the three cheapest remedies.
    """
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames hold the tensors that fill the memory
        raise UserError(sentence(program, config, ranks)) from None


def sentence(program: Program, config: Config, ranks: Ranks) -> str:
    """Say which rank ran out, what its configuration needs, what the rank can have, and what would help."""
    asked = f"rank {ranks.rank} ran out of memory"
    folder = config.model.checkpoint if program == "train" else config.reference_checkpoint
    if folder is None:
        return f"{asked}."
    description = describe(sources.find(folder).folder)
    cuda = ranks.device.type == "cuda"
    there = available(ranks.device)
    where = {
        "world_size": ranks.world_size,
        "program": program,
        "device": "cuda" if cuda else "cpu",
        "transformer_engine": HAVE_TRANSFORMER_ENGINE,
    }
    # Megatron numbers the ranks stage by stage: all ranks of the first pipeline stage come first.
    stage = ranks.rank * config.parallel.pipeline_model_parallel_size // ranks.world_size
    needs = plan(config, description, stage=stage, **where)  # type: ignore[arg-type]
    help_ = remedies(config, description, available=there, **where)  # type: ignore[arg-type]
    said = f"{asked}: by the planner's arithmetic its configuration needs {needs.sentence()}"
    said += f"; the rank can have {size(there)}"
    if needs.bytes <= there:
        said += ", which should be enough: other programs or gaps between tensors take the rest"
    if not help_:
        return f"{said}; lower data.max_length, or take a smaller model."
    return f"{said}; what would help: {'; '.join(remedy.sentence() for remedy in help_)}."


def available(device: torch.device) -> int:
    """Bytes that this process can have: those of its GPU, or its share of the machine's, at most its own limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text(encoding="utf-8").strip()).isdigit():
        machine = min(machine, int(text))
    share = machine // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    return share if own == resource.RLIM_INFINITY else min(share, own)
