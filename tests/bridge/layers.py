"""Stand-ins for Transformer Engine's layers on a CPU: parameters of the same names, shapes and places in checkpoints.

Megatron-Core's specs, Megatron-Bridge's models and its maps of names know these layers by their classes' names. Nothing
is computed with them. Runs in Megatron-Bridge's environment.
"""

from __future__ import annotations

import sys
import types
from typing import Any


def install() -> None:
    """Let Megatron-Core and Megatron-Bridge find the stand-ins, and no CUDA. Before Megatron-Bridge is imported."""
    import torch
    from megatron.core import optimizer
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    assert optimizer and not extension.HAVE_TE, "Transformer Engine is there, and needs no stand-in"

    class TENorm(torch.nn.RMSNorm):
        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
            super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)

    class TEColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
        pass

    class TELayerNormColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
        def __init__(self, input_size: int, *sizes: int, config: Any, **options: Any) -> None:
            super().__init__(input_size, *sizes, config=config, **options)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

    class TERowParallelLinear(RowParallelLinear):  # type: ignore[misc]
        pass

    class TEDotProductAttention(DotProductAttention):  # type: ignore[misc]
        pass

    class Layers:
        """Which class Megatron-Core's spec of a layer with Transformer Engine takes for what."""

        def column_parallel_linear(self) -> type:
            return TEColumnParallelLinear

        def row_parallel_linear(self) -> type:
            return TERowParallelLinear

        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return TELayerNormColumnParallelLinear

        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
            return TENorm

        def core_attention(self) -> type:
            return TEDotProductAttention

    for layer in (
        TENorm,
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
        TEDotProductAttention,
    ):
        setattr(extension, layer.__name__, layer)
    gpt_layer_specs.TESpecProvider = Layers
    from megatron.core.transformer import transformer_block

    transformer_block.LayerNormImpl = TENorm
    _stand_in_for_the_package()
    tensor = torch.tensor
    torch.tensor = lambda *values, device=None, **options: tensor(  # type: ignore[assignment]
        *values, device=None if device == "cuda" else device, **options
    )
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_rng_state = lambda *_: torch.zeros(8, dtype=torch.uint8)


class _Anything(type):
    """A class that has every attribute, for annotations and for classes that are made of it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def _stand_in_for_the_package() -> None:
    """Megatron-Bridge's adapters import the package whether or not it is there, and are not used here."""
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common"):
        module: Any = types.ModuleType(name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: _Anything(attribute, (), {})
        sys.modules[name] = module
    package: Any = sys.modules["transformer_engine"]
    package.pytorch = sys.modules["transformer_engine.pytorch"]
