"""The head and the divergence never hold more than a tile of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tgdpo_megatron.model import vocabulary
from tgdpo_megatron.model.divergence import Divergence
from tgdpo_megatron.model.head import LabelledLogProbs

LABELS, HIDDEN, VOCABULARY = 64, 8, 2000


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("divergence", [False, True])
def test_no_tensor_is_larger_than_a_tile_or_the_weights_gradient(
    divergence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full logits would be 128,000 numbers; a tile of 128 columns is 8,192, the weight and its gradient 16,000."""
    monkeypatch.setitem(vocabulary.TILE_ELEMENTS, "cpu", 1)
    hidden, frozen = torch.randn(2, LABELS, HIDDEN)
    weight, frozen_weight = torch.randn(2, VOCABULARY, HIDDEN)
    policy = hidden.requires_grad_(), weight.requires_grad_()
    reference = frozen, frozen_weight.clone()
    shard = vocabulary.VocabShard(start=0, columns=VOCABULARY)
    with Largest() as largest:
        logps, _, log_normalisers = LabelledLogProbs.apply(
            *policy, [reference], torch.arange(LABELS), shard, None, True
        )
        total = logps.sum()
        if divergence:
            total = total + Divergence.apply(*policy, reference, log_normalisers, shard, None).sum()
        total.backward()
    assert LABELS * 128 <= largest.elements <= VOCABULARY * HIDDEN


@pytest.mark.parametrize("tile", [128, 1 << 22], ids=["three tiles", "one tile, kept"])
def test_a_nearly_certain_label_keeps_its_small_gradient_in_bf16(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """p − 1 is about −0.003 there; p itself, rounded to 8 bits, would be 1 or 0.996."""
    monkeypatch.setitem(vocabulary.TILE_ELEMENTS, "cpu", tile)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 64, generator=generator).bfloat16()
    labels = torch.tensor([3, 130, 299, 77])
    weight = (0.1 * torch.randn(300, 64, generator=generator)).bfloat16()
    weight[labels] = (12 * hidden.float() / hidden.float().square().sum(dim=1, keepdim=True)).bfloat16()
    logits = (hidden @ weight.t()).double()  # as rounded as they are in the head
    wrong = logits.softmax(dim=1) - torch.nn.functional.one_hot(labels, 300)
    at_label = wrong.gather(1, labels[:, None])
    assert ((at_label < -1e-3) & (at_label > -5e-3)).all()
    policy = weight.clone().requires_grad_()
    shard = vocabulary.VocabShard(start=0, columns=300)
    logps, *_ = LabelledLogProbs.apply(hidden.clone().requires_grad_(), policy, [], labels, shard, None, True)
    logps.sum().backward()
    expected = -(wrong.t() @ hidden.double())[labels]
    assert policy.grad is not None
    assert float((policy.grad[labels].double() - expected).norm() / expected.norm()) < 0.01
