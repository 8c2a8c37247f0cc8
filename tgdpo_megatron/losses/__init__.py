"""The losses: pure functions of per-token log-probs, without Megatron or ranks. One file for each loss or family.

In a notebook::

    import torch
    from tgdpo_megatron.config import LossConfig
    from tgdpo_megatron.losses import Pairs
    from tgdpo_megatron.pair_losses import pair_losses

    pairs = Pairs(pair=torch.tensor([0, 0, 0]), side=torch.tensor([0, 0, 1]), num_pairs=1)
    policy = torch.tensor([-0.5, -1.2, -0.9], requires_grad=True)
    losses, margins = pair_losses(
        LossConfig(type="tgdpo", beta=0.1, alpha=0.5), policy, pairs,
        reference=torch.tensor([-0.7, -1.0, -0.8]), guidance=torch.tensor([-0.4, -1.3, -1.0]),
    )
    losses.mean().backward()
"""

from __future__ import annotations

import importlib
import pkgutil

from tgdpo_megatron.losses.declaration import Loss, Metric, Option, check_together
from tgdpo_megatron.losses.pairs import CHOSEN, REJECTED, Pairs

__all__ = ["CHOSEN", "LOSSES", "REJECTED", "Loss", "Metric", "Option", "Pairs", "check_declarations"]


def _declared() -> list[Loss]:
    """Every Loss that a file of this folder holds, in the order of the files."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{file}") for file in files]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Loss)]
    return list({id(loss): loss for loss in found}.values())  # a file may import the loss of another


_DECLARED = _declared()
LOSSES = {loss.name: loss for loss in _DECLARED}
"""`loss.type` -> its declaration."""


def check_declarations() -> None:
    """Check that every declaration agrees with its formula, and with the other declarations.

    Raises:
        UserError: A declaration does not agree; the sentence names its file.
    """
    for loss in _DECLARED:
        loss.check()
    check_together(_DECLARED)
