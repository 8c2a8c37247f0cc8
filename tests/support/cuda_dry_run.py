"""Whole training and scoring jobs in ranks that believe in a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tgdpo_megatron.platform.processes import Ranks

PRETENCE: Any = None
"""Set before the ranks are joined, in the block at the end."""


def run(ranks: Ranks, *, jobs: list[dict[str, Any]], scoring: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Score, then train. Returns the last metrics of each training job, and what this rank waited for in it."""
    from tests.support.jobs import score_all, train_all

    score_all(ranks, recipe="dpo_tiny", jobs=scoring)
    found = []
    for job in jobs:
        PRETENCE.waits.clear()
        ((*_, last),) = train_all(ranks, recipe="dpo_tiny", jobs=[job])
        found.append({"metrics": last, "waits": list(PRETENCE.waits)})
    return found


def attention_kernels(ranks: Ranks) -> dict[str, bool]:
    """Which kernels scaled_dot_product_attention may choose from."""
    kernels = torch.backends.cuda
    return {"flash": kernels.flash_sdp_enabled(), "cudnn": kernels.cudnn_sdp_enabled()}


def planted(ranks: Ranks) -> dict[str, str]:
    """What comes of lines that are wrong on a GPU: the error's name, or why they wait."""
    here = torch.ones(3)
    there = torch.ones(3, device=ranks.device)
    lines: dict[str, Callable[[], Any]] = {
        "a tensor made without its device": lambda: there * torch.zeros(3),
        "a buffer of another device, in place": lambda: there.add_(torch.full((3,), 2.0)),
        "a matrix product of both": lambda: there[None] @ here[:, None],
        "a backward pass of both": lambda: there.clone().requires_grad_().mul(there).backward(here),
        "a collective of the host's tensor": lambda: dist.all_reduce(here),
        "an array of the device's tensor": lambda: there.numpy(),
        "a number of the host": lambda: there * torch.tensor(2.0),
        "a tensor made like another": lambda: there + torch.zeros_like(there) + there.new_ones(3),
        "a view of a copy": lambda: there + here.to(ranks.device).view(3, 1)[:, 0],
        "a number read": lambda: there.sum().item(),
        "a choice made": lambda: bool(there.sum() > 0),
        "a list of numbers read": lambda: torch.tensor([value for value in there]),
        "a boolean index": lambda: there[there > 0],
        "a copy that waits": lambda: here.to(ranks.device),
        "a copy from memory that is not pinned": lambda: here.to(ranks.device, non_blocking=True),
        "a copy that does not wait": lambda: here.pin_memory().to(ranks.device, non_blocking=True),
    }
    found = {}
    for name, line in lines.items():
        PRETENCE.waits.clear()
        try:
            line()
            found[name] = "; ".join(wait.rpartition(": ")[2] for wait in PRETENCE.waits)
        except (RuntimeError, TypeError) as error:
            found[name] = type(error).__name__
    return found


if __name__ == "__main__":
    from tests.support import cuda_dry_run, program
    from tests.support.pretended_cuda import pretend

    with pretend() as cuda_dry_run.PRETENCE:
        program.main("tests.support.cuda_dry_run")
