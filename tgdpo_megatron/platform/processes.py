"""Processes: starting ranks, joining them, ending all of them when one fails."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tgdpo_megatron.config import ParallelConfig
from tgdpo_megatron.errors import (
    RANK_DIED,
    RANK_SILENT,
    SHOW_STACKS,
    STOPPED,
    UNEXPECTED,
    USER_ERROR,
    LostRankError,
    SilentRankError,
    UserError,
    ran_out_of_memory,
    refusal,
)
from tgdpo_megatron.platform import checks, cpu, environment, torch_adam, torch_clip
from tgdpo_megatron.platform.interrupts import FINISH, LAUNCHED
from tgdpo_megatron.quiet import debugging, quiet


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
def job(module: str, *, processes: int, timeout_minutes: float) -> Iterator[Ranks]:
    """Be one rank of a job, joined to the others.

    Under torchrun this process is a rank already. Otherwise, for one process, it becomes the rank itself. For more, it
    starts them on this machine with its own command line, watches them, and exits with their result.

    Args:
        module: The program, as in `python -m MODULE`.
        timeout_minutes: A collective that takes longer ends the job.
    """
    quiet()
    if "RANK" not in os.environ:
        environment.refuse_tasks_without_ranks()
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

    os.environ[LAUNCHED] = "1"  # ranks leave their sentence to this process
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
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
    # SIGINT and SIGTERM are handed on. Earlier versions of torch, without this setting, end the ranks themselves.
    settings.signals_to_handle = "SIGHUP,SIGQUIT"
    signal.signal(SHOW_STACKS, _ask_ranks_for_stacks)
    for number in (signal.SIGINT, signal.SIGTERM, FINISH):
        signal.signal(number, _ask_ranks_to_finish)
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
    print(sentence if code > 128 else f"error: {sentence}", file=sys.stderr, flush=True)
    return code


_asked_to_finish: list[signal.Signals] = []
"""The signals that this launcher received."""


def _ask_ranks_to_finish(number: int, _: Any) -> None:
    """Hand a signal on as the wish to finish the step and save. The second signal ends all ranks at once."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    _asked_to_finish.append(signal.Signals(number))
    if len(_asked_to_finish) > 1:
        raise SignalException(f"asked to stop by {signal.Signals(number).name} again", signal.Signals(number))
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ended in between
            if "RANK" in process.environ():
                process.send_signal(FINISH)


def _ask_ranks_for_stacks(*_: Any) -> None:
    """Hand the signal on, to one rank after another: what they write would mix."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ended in between
            if (rank := process.environ().get("RANK")) is not None:
                print(f"rank {rank} is process {process.pid}, which is at:", file=sys.stderr, flush=True)
                process.send_signal(SHOW_STACKS)
                time.sleep(0.3)


def _explain(failures: dict[int, Any]) -> tuple[int, str]:
    """Exit code and sentence for a failed job. The cause comes before its consequences."""
    said = [failure for failure in failures.values() if failure.exitcode == USER_ERROR]
    if said:
        return USER_ERROR, _message(said[0]) or "a rank refused its input; see the lines above."
    for failure in failures.values():
        if failure.exitcode == STOPPED:
            return 128 + (_asked_to_finish or [signal.SIGTERM])[0], _message(failure) or "the run was stopped."
    for rank, failure in failures.items():
        if _asked_to_finish and failure.exitcode == -FINISH:  # it was not yet, or no longer, training
            return 128 + _asked_to_finish[0], (
                f"stopped by {_asked_to_finish[0].name}, with no training step under way; what was saved or scored is "
                "kept, and the same command goes on (a training that has a checkpoint: with train.resume=true)."
            )
        if failure.exitcode == RANK_SILENT:  # the silent one may end later, by SIGKILL
            return UNEXPECTED, f"rank {rank} stopped, because {_message(failure)} All ranks were stopped."
    consequences = (
        -signal.SIGABRT,  # NCCL aborts a rank that lost a peer; but other things abort as well
        RANK_DIED,  # gloo raised an error in a rank that lost a peer
        -signal.SIGTERM,  # the launcher ended it
    )

    def how_late(item: tuple[int, Any]) -> tuple[int, bool, int]:
        rank, code = item[0], item[1].exitcode
        return (consequences.index(code) + 1 if code in consequences else 0, code >= 0, rank)

    rank, failure = min(failures.items(), key=how_late)
    if failure.exitcode == UNEXPECTED and (message := _message(failure)):
        return UNEXPECTED, (
            f"{message}; its traceback is above, in the lines that begin with [rank {rank}]. All ranks were stopped. "
            "The run folder is kept, and the newest whole checkpoint in it."
        )
    how = (
        f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"failed with exit code {failure.exitcode}"
    )
    return UNEXPECTED, f"rank {rank} {how}; all ranks were stopped. The newest whole checkpoint is kept."


def _message(failure: Any) -> str | None:
    """What a rank left for its launcher to say, if it came to that."""
    message = failure.error_file_data["message"]
    return message["message"] if isinstance(message, dict) else None


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
    in the store, and for its signs of life.

    Raises:
        UserError: On the other ranks, if the first rank met one, or was refused something by the operating system. The
            first rank itself raises what it met, whatever that is.
        LostRankError: On the other ranks, if the first rank failed otherwise.
        SilentRankError: On the other ranks, if the first rank has given no sign of life for as long as a collective may
            take.
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
_SECONDS_BETWEEN_SIGNS = 1.0
_LONGEST_PAUSE = 0.5
"""Most seconds between two looks into the store."""
_SECONDS_FOR_LAST_WORDS = 10.0
"""Seconds that the other ranks wait, so that a failed first rank can print its error before they end."""


def _do_first(store: Any, call: str, work: Callable[[], Any]) -> Any:
    """Do the work, show that this rank is alive meanwhile, and leave word how it ended."""
    ended = threading.Event()

    def show_life() -> None:
        while not ended.wait(_SECONDS_BETWEEN_SIGNS):
            store.add(f"{call}: signs of life", 1)

    thread = threading.Thread(target=show_life, daemon=True)
    thread.start()
    try:
        result = work()
    except BaseException as error:
        # Where memory ran out, this rank alone says so, once the planner has found what would help.
        store.set(call, json.dumps({"refusal": None if ran_out_of_memory(error) else refusal(error)}))
        raise
    finally:
        ended.set()
        thread.join()
    store.set(call, json.dumps({"done": True}))
    return result


def _wait_for_first(store: Any, call: str) -> None:
    """Wait until the first rank's work is done.

    Raises:
        UserError, LostRankError, SilentRankError: As on_first_rank.
    """
    signs, heard, pause = 0, time.monotonic(), 0.01
    while not store.check([call]):
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
        if (now := store.add(f"{call}: signs of life", 0)) != signs:
            signs, heard = now, time.monotonic()
        if (silent := time.monotonic() - heard) > store.timeout.total_seconds():
            raise SilentRankError(
                f"rank 0, for whose work this rank waits, has given no sign of life for {silent:.0f} s."
            )
    word = json.loads(store.get(call))
    if "done" in word:
        return
    if word["refusal"] is not None:
        raise UserError(word["refusal"])
    time.sleep(_SECONDS_FOR_LAST_WORDS)
    raise LostRankError("rank 0 failed, and its own lines say why; this rank stops too.")
