"""Compares the distributed head with a float64 dense log-softmax, and with Megatron's own cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tgdpo_megatron.config import ParallelConfig
from tgdpo_megatron.model import head, vocabulary
from tgdpo_megatron.platform.processes import Ranks, initialize_model_parallel

TOKENS, HIDDEN, LABELLED = 24, 32, 17


def compare(ranks: Ranks, *, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Largest errors of each case over all ranks; the vocabulary is split over all ranks."""
    initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=ranks.world_size), seed=1)
    return [_compare(ranks, **case) for case in cases]


def _compare(
    ranks: Ranks,
    *,
    vocab_size: int,
    sequence_parallel: bool,
    models: int,
    tile: int,
    dtype: str = "float32",
    main_grad: bool = False,
    softcap: float | None = None,
) -> dict[str, float]:
    """One case. With `main_grad` the weight has Megatron's fp32 buffer, and two backward passes add up in it."""
    from megatron.core import parallel_state

    device = ranks.device
    vocabulary.TILE_ELEMENTS[device.type] = tile
    group = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(vocab_size)
    columns = 320  # of each rank, padding included; a tile is never narrower than 128
    kind = getattr(torch, dtype)
    hidden = [torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(kind) for _ in range(models)]
    weights = [
        (0.3 * torch.randn(columns * ranks.world_size, HIDDEN, generator=generator)).to(kind) for _ in range(models)
    ]
    rows = torch.randperm(TOKENS, generator=generator)[:LABELLED]
    labels = torch.randint(0, vocab_size, (LABELLED,), generator=generator)
    upstream, upstream_of_divergence = torch.randn(2, LABELLED, generator=generator)
    divergence = models > 1  # of the first model from the second

    mine = slice(columns * ranks.rank, columns * (ranks.rank + 1))
    share = slice(TOKENS // ranks.world_size * ranks.rank, TOKENS // ranks.world_size * (ranks.rank + 1))
    local_hidden = [
        (states[share] if sequence_parallel else states).clone().to(device).requires_grad_() for states in hidden
    ]
    local_weights = [weight[mine].clone().to(device).requires_grad_() for weight in weights]
    policy_weight: Any = local_weights[0]
    if main_grad:
        policy_weight.main_grad = torch.zeros_like(policy_weight, dtype=torch.float32)
        policy_weight.grad_added_to_main_grad = False
    for _ in range(2 if main_grad else 1):
        local_hidden[0].grad = None
        calls = _count_all_reduces()
        logps = head.labelled_logprobs(
            list(zip(local_hidden, local_weights, strict=True)),
            rows.to(device),
            labels.to(device),
            vocab_size=vocab_size,
            sequence_parallel=sequence_parallel,
            group=group,
            softcap=softcap,
            divergence=divergence,
        )
        reduces = calls()
        total = (logps[0] * upstream.to(device)).sum()
        (total + (logps[-1] * upstream_of_divergence.to(device)).sum() if divergence else total).backward()
    found_weight_grad = policy_weight.main_grad / 2 if main_grad else policy_weight.grad
    assert policy_weight.grad_added_to_main_grad if main_grad else True

    exact_hidden = [states.double().requires_grad_() for states in hidden]
    exact_weights = [weight.double().requires_grad_() for weight in weights]
    raw = [
        states[rows, 0] @ weight[:vocab_size].t() for states, weight in zip(exact_hidden, exact_weights, strict=True)
    ]
    logits = raw if softcap is None else [softcap * torch.tanh(every / softcap) for every in raw]
    whole = [torch.log_softmax(every, dim=-1) for every in logits]
    exact = torch.stack([every.gather(1, labels[:, None])[:, 0] for every in whole])
    exact_total = (exact[0] * upstream).sum()
    if divergence:
        apart = (whole[1].detach().exp() * (whole[1].detach() - whole[0])).sum(dim=-1)
        exact = torch.cat([exact, apart[None]])
        exact_total = exact_total + (apart * upstream_of_divergence).sum()
    exact_total.backward()
    hidden_grad, weight_grad = exact_hidden[0].grad, exact_weights[0].grad
    assert hidden_grad is not None and weight_grad is not None
    rounded = [torch.log_softmax(every.to(kind).double(), dim=-1).gather(1, labels[:, None])[:, 0] for every in logits]
    errors = {
        "logps": _error(logps, exact),
        "with rounded logits": _error(torch.stack(rounded), exact[:models]),
        "hidden gradient": _error(local_hidden[0].grad, hidden_grad[share] if sequence_parallel else hidden_grad),
        "weight gradient": _error(found_weight_grad, weight_grad[mine]),
        "frozen gradients": float(any(x.grad is not None for x in local_hidden[1:] + local_weights[1:])),
        "against Megatron": 0.0
        if dtype != "float32" or softcap is not None
        else _against_megatron(hidden[0], weights[0], rows, labels, mine, vocab_size, logps[0]),
    }
    worst = torch.tensor(list(errors.values()), dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return {**dict(zip(errors, worst.tolist(), strict=True)), "all-reduces": reduces}


def _error(found: Any, wanted: torch.Tensor) -> float:
    return float((found.detach().cpu() - wanted.detach().cpu()).abs().max())


def _against_megatron(
    hidden: torch.Tensor, weight: torch.Tensor, rows: Any, labels: Any, mine: slice, vocab_size: int, logps: Any
) -> float:
    """Largest difference to minus Megatron's unfused cross-entropy, given −inf in the padded columns."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = hidden[rows, 0] @ weight.t()
    logits[:, vocab_size:] = float("-inf")
    mine_alone = logits[:, mine].contiguous().to(logps.device)
    return _error(logps, -vocab_parallel_cross_entropy(mine_alone, labels.to(logps.device)))


def _count_all_reduces() -> Any:
    """Count torch.distributed all-reduces from here until the returned function is called."""
    real, seen = dist.all_reduce, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("op"))
        return real(*args, **kwargs)

    dist.all_reduce = counting

    def stop() -> float:
        dist.all_reduce = real
        return float(len(seen))

    return stop
