"""Clipping all gradients at once gives what clipping one by one does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.optimizer import clip_grads

from tgdpo_megatron.platform import torch_clip


@pytest.fixture
def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) * 10.0**size for size in (1, 7, 3, 5)]


def test_the_norm_is_that_of_all_numbers_together(gradients: list[torch.Tensor]) -> None:
    torch_clip.install()
    norm, _ = clip_grads.l2_norm_impl(0, torch.zeros(1), [gradients], False)
    assert float(norm) == pytest.approx(np.linalg.norm(torch.cat(gradients).double().numpy()), rel=1e-6)
    assert norm.shape == (1,)


def test_clipped_gradients_have_the_norm_asked_for(gradients: list[torch.Tensor]) -> None:
    torch_clip.install()
    wanted = torch.cat(gradients).double()
    wanted *= 0.5 / wanted.norm()
    norm, _ = clip_grads.l2_norm_impl(0, torch.zeros(1), [gradients], False)
    clip_grads.multi_tensor_scale_impl(0, torch.zeros(1), [gradients, gradients], 0.5 / float(norm))
    assert torch.cat(gradients).double().numpy() == pytest.approx(wanted.numpy(), rel=1e-6)
