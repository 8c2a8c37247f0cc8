"""Transformer Engine and apex: left alone where there is no GPU, and named in a run's first lines where they are used.

Megatron looks for them when it is imported. For Adam, and for the norm of the gradient, it takes the first of
Transformer Engine, apex and torch that is there. NVIDIA's containers have both, also on a machine without a GPU.
"""

from __future__ import annotations

import sys
from typing import Any

from tgdpo_megatron.platform import versions

_NEED_A_GPU = ("transformer_engine", "apex", "amp_C")
"""Packages whose kernels are CUDA's alone; amp_C is a part of apex."""
_TITLES = {"transformer_engine": "Transformer Engine"}


def hide() -> None:
    """Let nothing find them. For a process without a GPU, before it imports Megatron."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _NEED_A_GPU]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(_NEED_A_GPU))  # type: ignore[arg-type]  # None: importing it fails


def name_layers(*, transformer_engine: bool) -> str:
    """Whose layers a model is built of, with the versions."""
    name = f"Transformer Engine {versions.transformer_engine()}" if transformer_engine else "local"
    return f"layers: {name} (megatron-core {versions.megatron()})"


def name_optimizer(optimizer: Any) -> str:
    """Whose optimizer it is that updates the weights.

    Args:
        optimizer: Megatron's, or a chain of several.
    """
    kind = type(getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer)
    package = kind.__module__.partition(".")[0]
    return f"optimizer: {_TITLES.get(package, package)}'s {kind.__name__}"
