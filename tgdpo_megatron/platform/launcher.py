"""The launcher: starts the ranks of a node, watches them, ends all when one fails, and says how the job ended.

One launcher runs on each node of a job. Whatever happens, all of them end with the same exit code, and the one of node
0 says one sentence. Where that one is lost, each of the others says so and ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from tgdpo_megatron.commands import PYTHON
from tgdpo_megatron.errors import (
    RANK_DIED,
    RANK_SILENT,
    REQUEUE,
    SHOW_STACKS,
    UNEXPECTED,
    USER_ERROR,
    StoppedError,
    code_of,
)
from tgdpo_megatron.platform.interrupts import FINISH, LAUNCHED, STARTED, asking
from tgdpo_megatron.platform.life import PLACE
from tgdpo_megatron.platform.meeting import KEPT, SECONDS_BETWEEN_LOOKS, Failure, Meeting, Report, Verdict
from tgdpo_megatron.platform.nodes import Nodes
from tgdpo_megatron.platform.parents import PARENT

_SECONDS_TO_END = 3.0
"""Once a rank has failed, the others have so long to end by themselves."""


@dataclass(frozen=True)
class _Rank:
    """A rank of this node.

    Attributes:
        words: The file in which it leaves its last words.
    """

    number: int
    process: subprocess.Popen[bytes]
    words: Path


class _Launcher:
    """The ranks of this node, and what this process was asked by signals.

    Attributes:
        at_once: Whether to end all ranks now, without waiting for the end of their step.
    """

    def __init__(self) -> None:
        self.ranks: list[_Rank] = []
        self.asked: list[int] = []
        self.at_once = False

    def ask_to_finish(self, number: int, _: FrameType | None) -> None:
        """Hand a signal on as the wish to finish the step and save.

        A batch system may send its signals several times, along several ways. A second Ctrl-C is a person's, and ends
        all ranks at once.
        """
        self.at_once = self.at_once or (number == signal.SIGINT and signal.SIGINT in self.asked)
        self.asked.append(number)
        for rank in self.ranks:
            rank.process.send_signal(FINISH)

    def show_stacks(self, *_: object) -> None:
        """Ask one rank after another where it is: what they write would mix."""
        for rank in self.ranks:
            if rank.process.poll() is None:
                said = f"rank {rank.number} is process {rank.process.pid}, which is at:"
                print(said, file=sys.stderr, flush=True)
                rank.process.send_signal(SHOW_STACKS)
                time.sleep(0.3)

    def wait(self, seconds: float) -> None:
        """Let time pass while there are no ranks yet.

        Raises:
            StoppedError: A signal asked for the end.
        """
        time.sleep(seconds)
        if self.asked:
            name = signal.Signals(self.asked[0]).name
            raise StoppedError(f"stopped by {name} while nodes were meeting; nothing was begun.", code_of(self.asked))


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int,
    nodes: Nodes,
    timeout_minutes: float,
    silence_minutes: float,
) -> int:
    """Run `python -m MODULE ARGUMENTS` as the ranks of this node, to the end of the job.

    Returns:
        The exit code of the job, the same on every node.

    Raises:
        UserError: The nodes do not come together.
        StoppedError: A signal asked for the end before the ranks were started.
    """
    launcher = _Launcher()
    signal.signal(SHOW_STACKS, launcher.show_stacks)
    for number in asking():
        signal.signal(number, launcher.ask_to_finish)
    meeting = Meeting(
        nodes, processes, timeout_minutes=timeout_minutes, silence_minutes=silence_minutes, wait=launcher.wait
    )
    with tempfile.TemporaryDirectory(prefix="tgdpo-") as folder:
        try:
            for local in range(processes):
                environment = _environment(nodes, meeting.port, processes, local)
                launcher.ranks.append(_start(module, arguments, environment, Path(folder)))
            if launcher.asked:  # before there was a rank to hand it on to
                launcher.ask_to_finish(launcher.asked.pop(), None)
            report = _watch(launcher, meeting)
        finally:
            for rank in launcher.ranks:
                rank.process.kill()  # a stopped process as well
    verdict = meeting.agree(report, judge)
    if verdict.sentence and meeting.speaks:
        by_force = any((rank.process.wait() or 0) < 0 for rank in launcher.ranks)
        _say(verdict, on_a_new_line=by_force)
    if not meeting.leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(verdict.code)  # a thread that waits for the store would abort the interpreter's own end
    return verdict.code


def _say(verdict: Verdict, *, on_a_new_line: bool) -> None:
    """Say how the job ended. A first rank that was killed has left its progress bar without the end of a line."""
    start = "\n" if on_a_new_line else ""
    print(f"{start}{'error: ' if verdict.is_failure else ''}{verdict.sentence}", file=sys.stderr, flush=True)


def _environment(nodes: Nodes, port: int, processes: int, local: int) -> dict[str, str]:
    """The variables that tell a rank its place, by torch's names. It finds the others in the launcher's store."""
    threads = max(1, _cores() // processes)
    place = {
        "RANK": nodes.rank * processes + local,
        "LOCAL_RANK": local,
        "GROUP_RANK": nodes.rank,
        "WORLD_SIZE": nodes.count * processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": nodes.host,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,  # read by earlier versions of torch
    }
    return {"OMP_NUM_THREADS": str(threads)} | os.environ | {name: str(value) for name, value in place.items()}


def _cores() -> int:
    """The processor cores that this process may use, where the system says which; otherwise those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(module: str, arguments: Sequence[str], environment: dict[str, str], folder: Path) -> _Rank:
    """Start a rank, in a session of its own: what a terminal or a batch system sends comes through the launcher."""
    number = int(environment["RANK"])
    words = folder / f"rank-{number}"
    process = subprocess.Popen(
        [*PYTHON, module, *arguments],
        env=environment
        | {LAUNCHED: str(words), PARENT: str(os.getpid()), STARTED: str(psutil.Process().create_time())},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    return _Rank(number, process, words)


def _watch(launcher: _Launcher, meeting: Meeting) -> Report:
    """Wait until all ranks of this node are done, or the job must end. Returns how those ended that failed."""
    ranks = launcher.ranks
    while not (meeting.over or launcher.at_once or any(rank.process.poll() for rank in ranks)):
        if all(rank.process.poll() == 0 for rank in ranks):
            return Report(asked=tuple(launcher.asked))
        meeting.pause(SECONDS_BETWEEN_LOOKS)
    # What comes first is not always the cause: ranks that lost another one end sooner than one that writes a traceback.
    deadline = time.monotonic() + _SECONDS_TO_END
    while any(rank.process.poll() is None for rank in ranks) and time.monotonic() < deadline and not launcher.at_once:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    failed = [(rank, code) for rank in ranks if (code := rank.process.poll())]
    host = socket.gethostname()
    failures = tuple(
        Failure(rank.number, host, code, _left(rank.words), _left(rank.words.with_name(rank.words.name + PLACE)))
        for rank, code in failed
    )
    return Report(failures, tuple(launcher.asked), cut_short=True)


def _left(file: Path) -> str | None:
    """What a rank left in a file, if anything."""
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None


def judge(reports: Sequence[Report]) -> Verdict:
    """How a job ended, from how the ranks of its nodes ended. The cause comes before its consequences."""
    failures = sorted((failure for report in reports for failure in report.failures), key=lambda failure: failure.rank)
    asked = [number for report in reports for number in report.asked]
    if not any(report.cut_short for report in reports):
        return Verdict(0)
    by_code = {failure.exitcode: failure for failure in reversed(failures)}  # the first rank of each
    if refused := by_code.get(USER_ERROR):
        return Verdict(USER_ERROR, refused.message or "a rank refused its input; see the lines above.")
    if stopped := by_code.get(REQUEUE):
        return Verdict(code_of(asked), stopped.message or "the run was stopped.", is_failure=False)
    if silent := by_code.get(RANK_SILENT):  # the silent one ends later, by SIGKILL
        said = silent.message or "A rank gave no sign of life."
        return Verdict(UNEXPECTED, f"{said} All ranks were stopped. {KEPT}")
    if asked and (not failures or {-number for number in asking()} & by_code.keys()):
        name = signal.Signals(asked[0]).name
        when = "at once by a second Ctrl-C" if asked.count(signal.SIGINT) > 1 else f"by {name}, with no step under way"
        return Verdict(
            code_of(asked),
            f"stopped {when}; what was saved or scored is kept, and the same command goes on (a training that has a "
            "checkpoint: with train.resume=true).",
            is_failure=False,
        )
    if not failures:  # another node failed, and the launchers say which
        return Verdict(UNEXPECTED, f"all ranks were stopped. {KEPT}")
    cause = min(failures, key=_how_late)
    several = len({failure.host for failure in failures}) > 1 or len(reports) > 1
    name = f"rank {cause.rank} (on {cause.host})" if several else f"rank {cause.rank}"
    if cause.exitcode == UNEXPECTED and cause.message:
        return Verdict(
            UNEXPECTED,
            f"{cause.message}; its traceback is above, in the lines that begin with [rank {cause.rank}]. All ranks "
            "were stopped. The run folder is kept, and the newest whole checkpoint in it.",
        )
    how = _name_of(-cause.exitcode) if cause.exitcode < 0 else f"failed with exit code {cause.exitcode}"
    where = f" It was last at: {cause.place}." if cause.place else ""
    killed = (
        " Where nobody killed it, its machine may have run out of memory." if cause.exitcode == -signal.SIGKILL else ""
    )
    return Verdict(UNEXPECTED, f"{name} {how}; all ranks were stopped. {KEPT}{where}{killed}")


_CONSEQUENCES = (
    -signal.SIGABRT,  # NCCL aborts a rank that lost a peer; but other things abort as well
    RANK_DIED,  # gloo raised an error in a rank that lost a peer
)


def _how_late(failure: Failure) -> tuple[int, bool, int]:
    """Sorts causes before their consequences."""
    late = _CONSEQUENCES.index(failure.exitcode) + 1 if failure.exitcode in _CONSEQUENCES else 0
    return late, failure.exitcode >= 0, failure.rank


def _name_of(number: int) -> str:
    try:
        return f"was ended by {signal.Signals(number).name}"
    except ValueError:  # one of the real-time signals
        return f"was ended by signal {number}"
