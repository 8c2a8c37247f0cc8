"""Optimizer state goes from one implementation of Adam to another."""

from __future__ import annotations

import torch

from tgdpo_megatron.platform.torch_adam import complete_options

FUSED_ADAM = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
"""What Transformer Engine 2.11's FusedAdam has for every group, and reads at every step."""


def test_options_that_only_this_adam_knows_are_its_own_and_saved_ones_stay() -> None:
    saved = {**torch.optim.AdamW([torch.zeros(1)], lr=7e-7, weight_decay=0.1).defaults, "step": 12.0}
    complete_options([saved], FUSED_ADAM, torchs=False)
    assert saved["bias_correction"] is True and saved["lr"] == 7e-7 and saved["weight_decay"] == 0.1
    assert saved["step"] == 12 and isinstance(saved["step"], int)


def test_torchs_own_groups_are_left_as_they_were_saved() -> None:
    saved = {**torch.optim.AdamW([torch.zeros(1)], lr=7e-7).defaults, "step": 12.0}
    before = dict(saved)
    complete_options([saved], torch.optim.AdamW([torch.zeros(1)]).defaults, torchs=True)
    assert saved == before
