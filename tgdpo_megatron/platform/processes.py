"""Processes: starting ranks, joining them, ending all of them when one fails."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tgdpo_megatron.config import ParallelConfig
from tgdpo_megatron.errors import LostRankError, UserError, ran_out_of_memory, refusal
from tgdpo_megatron.platform import checks, cpu, environment, life, torch_adam, torch_clip
from tgdpo_megatron.platform.launcher import launch
from tgdpo_megatron.platform.nodes import ALONE, Nodes
from tgdpo_megatron.quiet import debugging, quiet

RANK_TIMEOUT_MINUTES = 5.0
"""The default of train.rank_timeout_minutes, for programs that have no settings."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        store: Where ranks leave each other word without a collective. None for a rank that is alone.
    """

    rank: int
    world_size: int
    local_rank: int
    device: Any
    store: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prepares data and prints."""
        return self.rank == 0


@contextlib.contextmanager
def job(
    module: str,
    *,
    processes: int,
    timeout_minutes: float,
    rank_timeout_minutes: float = RANK_TIMEOUT_MINUTES,
    nodes: Nodes = ALONE,
) -> Iterator[Ranks]:
    """Be one rank of a job, joined to the others.

    Under torchrun this process is a rank already. Otherwise, for one process, it becomes the rank itself. For more, it
    starts them on this machine with its own command line, watches them, and exits with their result.

    Args:
        module: The program, as in `python -m MODULE`.
        processes: Ranks on this node.
        timeout_minutes: A collective that takes longer ends the job. So long the nodes wait for each other, too.
        rank_timeout_minutes: A rank that stands still for longer ends the job.
        nodes: The place of this node among those of the job.
    """
    quiet()
    if "RANK" not in os.environ:
        environment.refuse_tasks_without_ranks(nodes.count)
        if nodes.count * processes > 1:
            sys.exit(
                launch(
                    module,
                    sys.argv[1:],
                    processes=processes,
                    nodes=nodes,
                    timeout_minutes=timeout_minutes,
                    silence_minutes=rank_timeout_minutes,
                )
            )
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    ranks = _join(timeout_minutes)
    with life.shown(ranks.rank, ranks.world_size, silence_minutes=rank_timeout_minutes):
        yield ranks
    dist.destroy_process_group()


def _join(timeout_minutes: float) -> Ranks:
    """Check the packages beneath us, make Megatron run here, join the process group."""
    place = environment.place_in_job()
    environment.check_open_files()
    checks.check_packages()
    cpu.install()
    torch_adam.install()
    torch_clip.install()
    rank, world, local = place.rank, place.world_size, place.local_rank
    torch.autograd.set_detect_anomaly(os.environ.get("TGDPO_DETECT_ANOMALY", "") not in ("", "0"))
    if debugging():
        form = f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=logging.INFO, format=form)
    device = _device(local)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        # torch prefers cuDNN's attention on an H200; it builds a plan for every new length, and ours all differ.
        torch.backends.cuda.enable_cudnn_sdp(False)
    timeout = timedelta(minutes=timeout_minutes)
    store = environment.meet(place, timeout)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    return Ranks(rank, world, local, device, None if world == 1 else dist.PrefixStore("tgdpo", store))


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


def command_words() -> list[str]:
    """The words of the command that started this program, where it is known."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", spec.name, *sys.argv[1:]] if spec is not None and "." in spec.name else []


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

    The work may take longer than any collective: until it is done, the other ranks look for a word of the first rank
    in the store. That the first rank is alive is watched as always, see life.py.

    Raises:
        UserError: On the other ranks, if the first rank met one, or was refused something by the operating system. The
            first rank itself raises what it met, whatever that is.
        LostRankError: On the other ranks, if the first rank failed otherwise.
    """
    if ranks.world_size == 1:
        return work()
    call = f"work of the first rank, {next(_calls)}"
    outcome: list[Any] = [None]
    if ranks.is_first:
        outcome[0] = _do_first(ranks.store, call, work)
    else:
        _wait_for_first(ranks.store, call)
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


_calls = itertools.count()
"""Counts the same on every rank, since the calls are collective."""
_LONGEST_PAUSE = 0.5
"""Most seconds between two looks into the store."""
_SECONDS_FOR_LAST_WORDS = 10.0
"""Seconds that the other ranks wait, so that a failed first rank can print its error before they end."""


def _do_first(store: Any, call: str, work: Callable[[], Any]) -> Any:
    """Do the work, and leave word how it ended."""
    try:
        result = work()
    except BaseException as error:
        # Where memory ran out, this rank alone says so, once the planner has found what would help.
        store.set(call, json.dumps({"refusal": None if ran_out_of_memory(error) else refusal(error)}))
        raise
    store.set(call, json.dumps({"done": True}))
    return result


def _wait_for_first(store: Any, call: str) -> None:
    """Wait until the first rank's work is done, however long it takes.

    Raises:
        UserError, LostRankError: As on_first_rank.
    """
    pause = 0.01
    while not store.check([call]):
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    word = json.loads(store.get(call))
    if "done" in word:
        return
    if word["refusal"] is not None:
        raise UserError(word["refusal"])
    time.sleep(_SECONDS_FOR_LAST_WORDS)
    raise LostRankError("rank 0 failed, and its own lines say why; this rank stops too.")
