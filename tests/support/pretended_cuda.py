"""A CUDA device pretended on the CPU: real numbers, real collectives, and torch's rules about devices.

Every tensor lives on the CPU; its storage remembers where the program believes it to be. Asked for its device, a
tensor answers so; two tensors believed to be on different devices refuse to be combined, as they would; and what
would make host and device wait for each other is recorded with the line that asked for it. "NCCL" is gloo that takes
tensors of the device alone.

What it cannot see: kernels that CUDA lacks or has other rules for, streams, memory, time.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU, EITHER = torch.device("cuda", 0), torch.device("cpu"), None
OURS = Path(__file__).resolve().parent.parent.parent / "tgdpo_megatron"
LIBRARIES = ("megatron", "torch/optim", "torch/distributed")

aten: Any = torch.ops.aten
_TRANSFERS = (aten.copy_.default, aten._to_copy.default)
_INDEXED = (aten.index.Tensor, aten.index_put_.default)
READS = {
    aten._local_scalar_dense.default: "a number is read",
    aten.equal.default: "a comparison is read",
    aten.nonzero.default: "the size of a result depends on values",
    aten.masked_select.default: "the size of a result depends on values",
    aten.repeat_interleave.Tensor: "the size of a result depends on values",
    aten._unique2.default: "the size of a result depends on values",
    aten.bincount.default: "the size of a result depends on values",
}


class WrongDeviceError(RuntimeError):
    """What CUDA or NCCL would have refused."""


class Pretence:
    """What is pretended, and what was seen.

    Attributes:
        waits: "FILE:LINE code: reason" of each time host and device would have waited for each other.
        keeps_sums: Whether the device's matrix products give their fp32 sums, as torch's do for CUDA from 2.8 on.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.keeps_sums = True
        self.on_gloo: set[str] = set()

    def wait(self, reason: str) -> None:
        if "work.wait()" not in (line := _line()):  # gloo's own copies
            self.waits.append(f"{line}: {reason}")


def place_of(tensor: Tensor) -> torch.device | None:
    """Where a tensor is believed to be; EITHER where C++ made it and did not say."""
    place: torch.device | None = getattr(tensor.untyped_storage(), "place", CPU)
    return place


def _put(tensor: Tensor, place: torch.device | None) -> Tensor:
    tensor.untyped_storage().place = place  # type: ignore[attr-defined]
    return tensor


def _line() -> str:
    """The innermost line of ours, or else of a library we drive."""
    frames = [frame for frame in traceback.extract_stack() if "pretended_cuda" not in frame.filename]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(OURS)]
    theirs = [frame for frame in frames if any(f"site-packages/{name}/" in frame.filename for name in LIBRARIES)]
    inner = theirs[-1:] if theirs and (not ours or frames.index(theirs[-1]) > frames.index(ours[-1])) else []
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in [*inner, *ours[-1:]])


class _Rules(TorchDispatchMode):
    """Below autograd: no operation on tensors of two devices; results are where their arguments are."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self.pretence = pretence
        self.asked: list[torch.device | None] = []  # where the Python call in progress wants a new tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        places = {place_of(leaf) for leaf in given if leaf.dim() or place_of(leaf) == CUDA} - {EITHER}
        if func.namespace == "c10d":
            self._collective(func, args, given)
        elif func in _TRANSFERS:
            if func is aten.copy_.default and {CUDA, CPU} <= {place_of(leaf) for leaf in given}:
                self._copied(place_of(args[1]), args[1], bool(args[2:] and args[2]))
            places = {place_of(args[0])} - {EITHER}
        elif len(places) > 1:
            found = ", ".join(f"{place_of(leaf)} {list(leaf.shape)}" for leaf in given)
            raise WrongDeviceError(f"{func} of tensors on different devices ({found}) at {_line()}")
        on_device = places == {CUDA}
        if on_device and func in READS:
            self.pretence.wait(READS[func])
        elif (
            on_device and func in _INDEXED and any(index is not None and index.dtype is torch.bool for index in args[1])
        ):
            self.pretence.wait("a boolean index")
        known = {leaf.untyped_storage()._cdata for leaf in given}
        if func is aten.mm.dtype and on_device and self.pretence.keeps_sums:  # a kernel that the CPU lacks
            result = torch.mm(args[0].float(), args[1].float())
        else:
            result = func(*args, **(kwargs or {}))
        place = next(iter(places), place_of(given[0])) if given else self.asked[-1] if self.asked else EITHER
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                _put(leaf, place)
        return result

    def _copied(self, source: torch.device | None, tensor: Tensor, non_blocking: bool) -> None:
        pinned = getattr(tensor.untyped_storage(), "pinned", False)
        if source == CUDA:
            self.pretence.wait("copied to the host")
        elif tensor.dim() and not (non_blocking and pinned):
            self.pretence.wait("copied from memory that is not pinned" if non_blocking else "copied to the device")

    def _collective(self, func: Any, args: Any, given: list[Tensor]) -> None:
        scripted = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        if any(dist.ProcessGroup.unbox(group).group_name in self.pretence.on_gloo for group in scripted):
            return
        if func is not torch.ops.c10d.barrier.default and any(place_of(leaf) == CPU for leaf in given):
            raise WrongDeviceError(f"{func}: NCCL takes no tensors on the host, at {_line()}")


class _Answers(TorchFunctionMode):
    """Above autograd: devices asked for, and devices told."""

    def __init__(self, pretence: Pretence, rules: _Rules) -> None:
        super().__init__()
        self.pretence, self.rules = pretence, rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name == "__get__":
            return self._property(func, args)
        if name in ("to", "cuda", "cpu"):
            return self._moved(func, name, args, kwargs)
        if name in ("numpy", "__array__") and place_of(args[0]) == CUDA:
            raise TypeError(f"can't convert a tensor on the device to numpy, at {_line()}")
        if name == "tolist" and place_of(args[0]) == CUDA:
            self.pretence.wait("a list is read")
        if name == "type" and len(args) == 1 and not kwargs and place_of(args[0]) != CPU:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if name == "get_device":
            return -1 if place_of(args[0]) == CPU else 0
        if name == "pin_memory":
            pinned = args[0].clone()
            pinned.untyped_storage().pinned = True
            return pinned
        if name == "is_pinned":
            return getattr(args[0].untyped_storage(), "pinned", False)
        asked = kwargs.get("device")
        pinned = kwargs.pop("pin_memory", False)
        if asked is not None:
            kwargs["device"] = CPU
        if name == "tensor" and asked is not None and _device(asked) == CUDA:
            self.pretence.wait("a tensor is made of Python numbers, and copied")
        if name == "tensor" and any(isinstance(leaf, Tensor) and place_of(leaf) == CUDA for leaf in tree_leaves(args)):
            self.pretence.wait("numbers are read, one by one")
        source = next((arg for arg in args if isinstance(arg, Tensor)), None)
        default = place_of(source) if source is not None else CPU
        self.rules.asked.append(default if asked is None else _device(asked))
        try:
            result = func(*args, **kwargs)
        finally:
            self.rules.asked.pop()
        if isinstance(result, Tensor):
            if asked is not None:
                _put(result, _device(asked))
            if pinned:
                result.untyped_storage().pinned = True  # type: ignore[attr-defined]
        return result

    def _property(self, func: Any, args: Any) -> Any:
        told: dict[str, Callable[[bool], Any]] = {
            "device": lambda on_device: CUDA if on_device else CPU,
            "is_cuda": lambda on_device: on_device,
            "is_cpu": lambda on_device: not on_device,
        }
        name = getattr(func.__self__, "__name__", "")
        return told[name](place_of(args[0]) != CPU) if name in told else func(*args)

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """.to(), .cuda(), .cpu(): a copy, where the device changes."""
        tensor, *rest = args
        rest += [kwargs.pop("device")] if "device" in kwargs else []
        if name == "to":
            to = next((arg for arg in rest if isinstance(arg, str | torch.device | Tensor) or type(arg) is int), None)
            target = place_of(tensor) if to is None else place_of(to) if isinstance(to, Tensor) else _device(to)
            dtype = next((arg for arg in [*rest, kwargs.get("dtype")] if isinstance(arg, torch.dtype)), None)
            dtype = to.dtype if isinstance(to, Tensor) else dtype
        else:
            target, dtype = (CUDA if name == "cuda" else CPU), None
        source = place_of(tensor)
        moves = target != source and EITHER not in (source, target)
        if moves:
            self.rules._copied(source, tensor, bool(kwargs.get("non_blocking") or any(arg is True for arg in rest[1:])))
        result: Tensor = tensor
        if dtype is not None or kwargs.get("copy"):
            result = torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=kwargs.get("copy", False))
        if moves:
            return _put(result.clone(memory_format=torch.preserve_format) if result is tensor else result, target)
        return result


def _device(asked: Any) -> torch.device:
    return CUDA if isinstance(asked, int) or "cuda" in str(asked) else CPU


class _Stream:
    """Streams and events of a device that does everything in order."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event(_Stream):
    """Done at once, and a millisecond after the one before."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def _function(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


@contextlib.contextmanager
def pretend() -> Iterator[Pretence]:
    """Let this process believe in CUDA devices, and that it has the first; its main thread while the block runs."""
    pretence = Pretence()
    cuda: Any = torch.cuda
    told: dict[str, Any] = dict.fromkeys(("set_device", "init", "_lazy_init", "empty_cache", "set_stream"))
    told |= {"is_available": True, "is_initialized": True, "current_device": 0, "device_count": 8}
    told |= {"memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None}
    told |= {"get_device_name": "NVIDIA H100 80GB HBM3"}
    for name, answer in told.items():
        setattr(cuda, name, _function(answer))  # one each: torch.compile tells its functions apart by identity
    cuda.synchronize = lambda *_: pretence.wait("torch.cuda.synchronize")
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream, cuda.default_stream, cuda.stream = (_function(_Stream()) for _ in range(3))
    torch.accelerator.current_stream = _function(_Stream())  # asked by torch's own CUDA build
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _function(None), _function(None)
    cuda.default_generators = tuple(torch.Generator() for _ in range(8))
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda._lazy_call = lambda call, **__: call()
    _pretend_nccl(pretence)
    rules = _Rules(pretence)
    answers = _Answers(pretence, rules)
    run_backward = torch.autograd._engine_run_backward

    def engine(*args: Any, **kwargs: Any) -> Any:
        with answers:  # asleep while torch.autograd.backward is called, which backward's own Python code must not see
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = engine  # type: ignore[assignment]
    with torch.autograd.set_multithreading_enabled(False), rules, answers:
        yield pretence


def _pretend_nccl(pretence: Pretence) -> None:
    distributed: Any = dist
    start, new_group = dist.init_process_group, dist.new_group

    def init_process_group(backend: str, **kwargs: Any) -> None:
        assert backend == "nccl"
        start("gloo", **kwargs)

    def make_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        kwargs.pop("pg_options", None)
        group = new_group(*args, backend="gloo", **kwargs)
        if backend == "gloo" and isinstance(group, dist.ProcessGroup):
            pretence.on_gloo.add(group.group_name)
        return group

    def object_device(group: Any = None) -> str:
        return "cpu" if group is not None and group.group_name in pretence.on_gloo else "cuda"

    distributed.init_process_group, distributed.new_group = init_process_group, make_group
    distributed.distributed_c10d._get_object_coll_device = object_device
