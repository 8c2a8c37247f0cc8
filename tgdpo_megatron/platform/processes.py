"""Processes: starting ranks, joining them, ending all of them when one fails."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tgdpo_megatron.config import ParallelConfig
from tgdpo_megatron.errors import RANK_DIED, USER_ERROR, UserError
from tgdpo_megatron.platform import checks, cpu, torch_adam, torch_clip


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    device: Any

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prepares data and prints."""
        return self.rank == 0


@contextlib.contextmanager
def job(module: str, *, processes: int, timeout_minutes: int) -> Iterator[Ranks]:
    """Be one rank of a job, joined to the others.

    Under torchrun this process is a rank already. Otherwise the first process starts `processes`
    ranks on this machine with its own command line, watches them, and exits with their result.

    Args:
        module: The program, as in `python -m MODULE`.
        timeout_minutes: A collective that takes longer ends the job.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in os.environ:
            raise UserError("srun started several tasks, but none is told its rank; start torchrun in each instead.")
        if processes > 1:
            sys.exit(_start_ranks(module, sys.argv[1:], processes))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    ranks = _join(timeout_minutes)
    yield ranks
    dist.destroy_process_group()


def _start_ranks(module: str, arguments: Sequence[str], processes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    os.environ["TGDPO_LAUNCHED"] = "1"  # ranks leave their sentence to this process
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
    )
    with _quiet_elastic():
        try:
            elastic_launch(settings, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            code, sentence = _explain(error.failures)
        except (SignalException, KeyboardInterrupt) as signalled:
            number = getattr(signalled, "sigval", signal.SIGINT)
            name = signal.Signals(number).name
            code, sentence = 128 + number, f"stopped by {name}; all ranks were stopped, the newest checkpoint is kept."
        else:
            return 0
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def _quiet_elastic() -> Iterator[None]:
    """torch's launcher logs a page about every failure; we say it in a sentence."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _explain(failures: dict[int, Any]) -> tuple[int, str]:
    """Exit code and sentence for a failed job. The cause comes before its consequences."""
    said = [failure for failure in failures.values() if failure.exitcode == USER_ERROR]
    if said:
        return USER_ERROR, _message(said[0])
    consequences = (
        -signal.SIGABRT,  # NCCL aborts a rank that lost a peer; but other things abort as well
        RANK_DIED,  # gloo raised an error in a rank that lost a peer
        -signal.SIGTERM,  # the launcher ended it
    )

    def how_late(item: tuple[int, Any]) -> tuple[int, bool, int]:
        rank, code = item[0], item[1].exitcode
        return (consequences.index(code) + 1 if code in consequences else 0, code >= 0, rank)

    rank, failure = min(failures.items(), key=how_late)
    how = (
        f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"failed with exit code {failure.exitcode}"
    )
    return 1, f"rank {rank} {how}; all ranks were stopped. The newest whole checkpoint is kept."


def _message(failure: Any) -> str:
    data = failure.error_file_data
    try:
        text: str = data["message"]["message"]
    except (KeyError, TypeError):
        text = "a rank refused its input; see the lines above."
    return text


def _join(timeout_minutes: int) -> Ranks:
    """Check the packages beneath us, make Megatron run here, join the process group."""
    checks.check_packages()
    cpu.install()
    torch_adam.install()
    torch_clip.install()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = _device(local)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        # torch prefers cuDNN's attention on an H200; it builds a plan for every new length, and ours all differ.
        torch.backends.cuda.enable_cudnn_sdp(False)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.HashStore() if world == 1 else None,
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=timeout_minutes),
    )
    return Ranks(rank, world, local, device)


def _device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    Raises:
        UserError: There are GPUs, but not one for each rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (gpus := torch.cuda.device_count()):
        raise UserError(
            f"rank {local_rank} of this machine has no GPU: {gpus} {'is' if gpus == 1 else 'are'} visible, and each "
            "rank needs its own; start fewer ranks, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU."
        )
    return torch.device("cuda", local_rank)


def initialize_model_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Make Megatron's process groups for a layout, and its random states."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def on_first_rank(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Do something once, on the first rank, and give every rank its result. Collective.

    Raises:
        UserError: On every rank, if the first rank met one; nobody is left waiting.
    """
    outcome: list[Any] = [None, None]
    if ranks.is_first:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
        except Exception as error:  # a full disk, say: the others must not wait for what will not come
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
