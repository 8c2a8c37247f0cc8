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
        logps, _, log_normalisers = LabelledLogProbs.apply(*policy, [reference], torch.arange(LABELS), shard)
        total = logps.sum()
        if divergence:
            total = total + Divergence.apply(*policy, reference, log_normalisers, shard).sum()
        total.backward()
    assert LABELS * 128 <= largest.elements <= VOCABULARY * HIDDEN
