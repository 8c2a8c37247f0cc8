"""Models without weights, whose modules are given their weights only while they run.

So a model of any size can score a few tokens in memory for one module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Every parameter that is made in here is on torch's meta device. Buffers are made as they are: they hold numbers
    that no checkpoint has."""
    register = Module.register_parameter

    def on_meta(self: Module, name: str, param: Parameter | None) -> None:
        register(self, name, None if param is None else Parameter(param.to("meta"), requires_grad=False))

    module: Any = Module
    module.register_parameter = on_meta
    try:
        yield
    finally:
        module.register_parameter = register


def lend(model: Module, read: Callable[[str], Tensor], done: Callable[[int], Any]) -> None:
    """Let each module without weights have its own weights while it runs.

    Args:
        read: Gives a weight by its name in the model.
        done: Told the number of elements of each weight that was read.
    """
    for name, module in model.named_modules():
        empty = {leaf: weight for leaf, weight in module._parameters.items() if weight is not None and weight.is_meta}
        if not empty:
            continue

        def bring(module: Module, _: Any, empty: dict[str, Any] = empty, prefix: str = name) -> None:
            for leaf in empty:
                value = read(f"{prefix}.{leaf}")
                done(value.numel())
                module._parameters[leaf] = Parameter(value, requires_grad=False)

        def take_back(module: Module, _: Any, output: Any, empty: dict[str, Any] = empty) -> None:
            module._parameters.update(empty)

        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take_back)
