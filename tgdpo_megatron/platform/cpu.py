"""Lets the unmodified megatron-core wheel run without CUDA, under gloo.

megatron-core names the device "cuda" in a few dozen lines. :func:`install` redirects these to the CPU, and changes
nothing where CUDA is available:

- Functions of `torch.cuda` that can only raise on a CPU build return the CPU or do nothing.
- In the Megatron modules listed below, tensor factories called with `device="cuda"` use the CPU.
- `Tensor.cuda()` returns the tensor. `Tensor.type()`, called from megatron.core, returns the name of the CUDA type,
  because megatron.core compares it with such names.
- The random-state tracker keeps CPU states.
- Transformer Engine and apex, which have no kernels for CPUs, are not found.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from tgdpo_megatron.platform import accelerators

# Megatron modules that name device="cuda" in code that this project runs.
_MODULES_NAMING_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.utils",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")
_CPU = torch.device("cpu")


def install() -> None:
    """Redirect megatron-core to the CPU, once per process. Does nothing where CUDA is available."""
    cuda: Any = torch.cuda
    if cuda.is_available() or cuda.current_device is _current_device:
        return
    accelerators.hide()
    _import_megatron()
    _redirect_torch_cuda()
    _redirect_factories()
    _redirect_tensor_methods()
    _redirect_random_states()


def _import_megatron() -> None:
    """Import Megatron without torch's compiler.

    Megatron hands small functions to torch.compile while it is imported. Loading the compiler then takes a third of the
    time of a start, and none of these functions runs on the path that is taken here.
    """
    compile_ = torch.compile

    def leave(function: Any = None, **_: Any) -> Any:
        return function if function is not None else leave

    torch.compile = leave  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_


def _current_device() -> torch.device:
    return _CPU


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


def _redirect_torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _current_device
    cuda.synchronize = cuda.current_stream = _do_nothing
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _do_nothing
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # A new function, because torch.compile's tables accept no function of torch under a second name.
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.manual_seed(seed)


class _TorchOnCpu(types.ModuleType):
    """`torch` with factories that put "cuda" tensors on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _redirect_factories() -> None:
    proxy: Any = _TorchOnCpu("torch")
    for name in _FACTORIES:
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    for name in _MODULES_NAMING_CUDA:
        module: Any = importlib.import_module(name)
        assert module.torch is torch, name
        module.torch = proxy


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _redirect_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    real_type = tensor.type

    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return real_type(self, dtype, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        name: str = real_type(self)
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core") else name

    tensor.type = type_
    tensor.cuda = lambda self, *args, **kwargs: self


def _redirect_random_states() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):  # type: ignore[misc]
        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    module: Any = megatron_random
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    module.CudaRNGStatesTracker = CpuRNGStatesTracker
