"""Jobs that start in a second: the real programs, in processes that are forked once all is imported.

A rank spends most of its start on importing torch and Megatron. Here one process imports them, and every rank is a copy
of it. What a rank then does is what it does under torchrun: it reads its command line and its place in the job, joins
the others through a store that a process outside of the ranks holds, and trains.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tests.support.ports import free_port

RANKS = 4
"""TP2×PP2."""


def import_everything() -> None:
    """Import what a rank imports. Afterwards this process has no threads beside its own, so that it can be forked."""
    import recipes.score  # noqa: F401
    import recipes.train  # noqa: F401
    import tests.support.program  # noqa: F401
    from tgdpo_megatron.errors import one_sentence_errors

    with one_sentence_errors():
        from tgdpo_megatron.platform import checks, cpu, processes, torch_adam, torch_clip  # noqa: F401

        checks.check_packages()
        cpu.install()
        torch_adam.install()
        torch_clip.install()
        import tgdpo_megatron.planning.out_of_memory
        import tgdpo_megatron.score
        import tgdpo_megatron.train  # noqa: F401


class Job:
    """Ranks that run, and the process that holds their store.

    Args:
        module: A program that import_everything has imported.
        arguments: The program's command line.
        log: File that gets what the ranks say.
        size: Number of ranks.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path, size: int = RANKS) -> None:
        port = free_port()
        self.log, self.size = log, size
        self.store = fork(lambda: _hold_store(port), log)
        self.ranks = [
            fork(lambda rank=rank: _be_rank(module, arguments, rank, size, port), log) for rank in range(size)
        ]
        self.codes: dict[int, int] = {}

    def running(self) -> list[int]:
        """The ranks that have not ended."""
        for rank, process in enumerate(self.ranks):
            if rank not in self.codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(self.size) if rank not in self.codes]

    def kill(self, rank: int) -> None:
        """End one rank in the hardest way."""
        if rank in self.running():
            os.kill(self.ranks[rank], signal.SIGKILL)

    def finish(self, patience: float) -> list[int]:
        """Wait for all ranks to end. Once one has failed, the others have some seconds to end by themselves."""
        while self.running() and not any(self.codes.values()):
            time.sleep(0.01)
        return self.end(patience)

    def end(self, patience: float) -> list[int]:
        """Wait some seconds for all ranks to end by themselves, kill the others, and return the exit codes."""
        last = time.monotonic() + patience
        while self.running() and time.monotonic() < last:
            time.sleep(0.01)
        for rank in self.running():
            self.kill(rank)
        while self.running():
            time.sleep(0.01)
        os.kill(self.store, signal.SIGKILL)
        os.waitpid(self.store, 0)
        return [self.codes[rank] for rank in range(self.size)]

    def said(self) -> str:
        """What the ranks said."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def in_a_process(work: Callable[[], object]) -> None:
    """Do something in a copy of this process, which stays without threads."""
    _, status = os.waitpid(fork(work), 0)
    assert status == 0


def fork(work: Callable[[], object], log: Path | None = None) -> int:
    """Do something in a copy of this process, which then ends as a program of its own does.

    Args:
        log: File that what it says is added to; None where it speaks to whom this process speaks, or sees to it itself.

    Returns:
        The number of the process. Its exit code is 0 where the work returned, else what Python's own would be.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        if log is not None:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code if isinstance(ended.code, int) else 1
        if code == 1 and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # there is one
        code = 1
    with contextlib.suppress(Exception):  # a file may take no more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _be_rank(module: str, arguments: Sequence[str], rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    sys.argv = [module, *arguments]
    sys.modules[module].main()


def _hold_store(port: int) -> NoReturn:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store:
        signal.pause()
    raise AssertionError
