"""One output layer's work, forward and backward, by our distributed head and by Megatron's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tgdpo_megatron.model import products

TOKENS, HIDDEN, VOCABULARY, LABELLED = 2048, 512, 32000, 0.69
CPU = torch.device("cpu")
ROUNDING = 0.02
"""bf16 products in another order: a few units in the last of 8 bits, relative to the largest."""


@dataclass
class Problem:
    """One layer's inputs. Gradients end in `weight.main_grad`, as under Megatron's data parallelism."""

    hidden: Any
    weight: Any
    predictors: Any
    labels: Any
    upstream: Any


def make_problem(
    tokens: int = TOKENS,
    *,
    width: int = HIDDEN,
    vocabulary: int = VOCABULARY,
    labelled: float = LABELLED,
    device: torch.device = CPU,
) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    here: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(tokens, 1, width, **here).bfloat16().requires_grad_()
    weight: Any = torch.nn.Parameter((0.05 * torch.randn(vocabulary, width, **here)).bfloat16())
    weight.main_grad = torch.zeros(vocabulary, width, device=device)
    weight.grad_added_to_main_grad = False
    predictors = torch.randperm(tokens, **here)[: int(labelled * tokens)].sort().values
    labels = torch.randint(0, vocabulary, (len(predictors),), **here)
    return Problem(hidden, weight, predictors, labels, torch.randn(len(predictors), **here))


def ours(problem: Problem) -> Tensor:
    """Forward and backward through the distributed head. Returns the log-probs."""
    from megatron.core import parallel_state

    from tgdpo_megatron.model.head import labelled_logprobs

    logps = labelled_logprobs(
        [(problem.hidden, problem.weight)],
        problem.predictors,
        problem.labels,
        vocab_size=problem.weight.size(0),
        sequence_parallel=False,
        group=parallel_state.get_tensor_model_parallel_group(),
    )[0]
    (logps * problem.upstream).sum().backward()
    return logps.detach()


def rounded(problem: Problem) -> Tensor:
    """Ours where each sum of a product is rounded to bf16, as it is where torch gives no more."""
    with rounded_sums():
        return ours(problem)


@contextmanager
def rounded_sums() -> Iterator[None]:
    """Within, the head rounds the sums of its products on every device."""
    with patch.object(products, "keeps_sums", return_value=False):
        yield


def megatrons(problem: Problem) -> Tensor:
    """Forward and backward through Megatron's column-parallel output layer and unfused cross-entropy."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    logits = linear_with_grad_accumulation_and_async_allreduce(
        input=problem.hidden,
        weight=problem.weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
    )
    labels, upstream = for_all_tokens(problem)
    logps = -vocab_parallel_cross_entropy(logits, labels[:, None])[:, 0]
    (logps * upstream).sum().backward()
    into_main_grad(problem.weight)
    return logps.detach()[problem.predictors]


def for_all_tokens(problem: Problem) -> tuple[Tensor, Tensor]:
    """Labels and upstream gradients of all tokens, 0 where there is no label. Both [tokens]."""
    labels = problem.labels.new_zeros(problem.hidden.size(0))
    labels[problem.predictors] = problem.labels
    upstream = problem.upstream.new_zeros(problem.hidden.size(0))
    upstream[problem.predictors] = problem.upstream
    return labels, upstream


@torch.no_grad()
def into_main_grad(weight: Any) -> None:
    """What Megatron's data-parallel hook does."""
    weight.main_grad.add_(weight.grad)
    weight.grad = None


def differences(methods: Mapping[str, Callable[[Problem], Tensor]], make: Callable[[], Problem]) -> dict[str, float]:
    """Largest differences of log-probs and gradients between `ours` and the others, relative to the largest value."""
    found = {}
    for name, method in methods.items():
        problem = make()
        logps = method(problem)
        found[name] = {
            "log-probs": logps,
            "hidden gradient": problem.hidden.grad.float(),
            "weight gradient": problem.weight.main_grad,
        }
    return {
        f"{what}, {other}": float((found["ours"][what] - theirs).abs().max() / theirs.abs().max())
        for other in found.keys() - {"ours"}
        for what, theirs in found[other].items()
    }
