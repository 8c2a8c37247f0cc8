"""Whole training and scoring jobs in ranks that believe in a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tgdpo_megatron.data.attention_plan import AttentionPlan
from tgdpo_megatron.model import kernels
from tgdpo_megatron.model.kernels import by_formula
from tgdpo_megatron.platform.processes import Ranks

PRETENCE: Any = None
"""Set before the ranks are joined, in the block at the end."""


class ByFormula:
    """The pretended GPU's attention kernel: the definition, in the precision of its arguments."""

    def __init__(self, heads: int, groups: int, channels: int, scale: float) -> None:
        self.scale = scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        return by_formula(query, key, value, plan, self.scale)


def run(
    ranks: Ranks, *, jobs: list[dict[str, Any]], scoring: list[dict[str, Any]], keeps_sums: bool = True
) -> list[dict[str, Any]]:
    """Score, then train. Returns the last metrics of each training job, and what this rank waited for in it."""
    from tests.support.jobs import score_all, train_all

    kernels.CANDIDATES = {"by formula": ByFormula}
    PRETENCE.keeps_sums = keeps_sums
    score_all(ranks, recipe="dpo_tiny", jobs=scoring)
    found = []
    for job in jobs:
        PRETENCE.waits.clear()
        ((*_, last),) = train_all(ranks, recipe="dpo_tiny", jobs=[job])
        found.append({"metrics": last, "waits": list(PRETENCE.waits)})
    return found


def heads(ranks: Ranks, *, cases: list[dict[str, Any]], keeps_sums: bool) -> list[dict[str, float]]:
    """The largest errors of the distributed head, as tests/support/head.py finds them."""
    from tests.support.head import compare

    PRETENCE.keeps_sums = keeps_sums
    return compare(ranks, cases=cases)


def products(ranks: Ranks, *, keeps_sums: bool) -> dict[str, Any]:
    """Of matrix products of both dtypes: the result's dtype, the largest error against float64 relative to the largest
    number, and that of a product added to a matrix in fp32. And how many products were made, those that ask included.
    """
    from tgdpo_megatron.model.products import add_product, product

    PRETENCE.keeps_sums = keeps_sums
    found: dict[str, Any] = {}
    with _Products() as made:
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((40, 300), (300, 50)))
            exact = left.double() @ right.double()
            left, right = left.to(ranks.device), right.to(ranks.device)
            once = product(left, right)
            total = torch.ones(40, 50, device=ranks.device)
            add_product(total, left, right)
            found[str(dtype)] = {
                "dtype": str(once.dtype),
                "error": float((once.cpu().double() - exact).abs().max() / exact.abs().max()),
                "added": float((total.cpu().double() - exact - 1).abs().max() / exact.abs().max()),
            }
    return found | {"products": made.number}


class _Products(TorchDispatchMode):
    """Counts matrix products of 16-bit matrices."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.dtype) and args[0].dtype == torch.bfloat16
        return func(*args, **(kwargs or {}))


def head_bytes(ranks: Ranks, *, keeps_sums: bool, labelled: int, hidden: int, vocabulary: int) -> list[int]:
    """The most bytes that are alive in the head's forward and in its backward, in bf16, without inputs and gradient of
    the weight; one tile."""
    from tests.support.memory import LiveBytes
    from tgdpo_megatron.model.head import LabelledLogProbs
    from tgdpo_megatron.model.vocabulary import VocabShard

    PRETENCE.keeps_sums = keeps_sums
    with LiveBytes() as tracker:
        states = torch.randn(labelled, hidden, device=ranks.device).bfloat16().requires_grad_()
        weight: Any = torch.randn(vocabulary, hidden, device=ranks.device).bfloat16().requires_grad_()
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
        labels = torch.zeros(labelled, dtype=torch.int64, device=ranks.device)
        given, result = tracker.live, []

        def forward() -> None:
            shard = VocabShard(0, vocabulary)
            result.append(LabelledLogProbs.apply(states, weight, [], labels, shard, None, True)[0])

        most = [tracker.peak_of(forward), tracker.peak_of(lambda: result[0].sum().backward())]
    return [peak - given for peak in most]


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
