"""How the launchers of several nodes meet, notice each other's end, and agree on how the job ended.

They leave each other word in a store that the launcher of node 0 holds. Ranks use the same store to find each other.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tgdpo_megatron.errors import REQUEUE, USER_ERROR, UserError, in_short
from tgdpo_megatron.platform.environment import UnknownNameError, reach
from tgdpo_megatron.platform.nodes import SECONDS_TO_ANSWER, Nodes

_SECONDS_BETWEEN_WORDS = 1.0
SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_FOR_REPORTS = 15
"""Once a node has failed, the others have so long to end their ranks and to say how they ended."""
KEPT = "The newest whole checkpoint is kept."


@dataclass(frozen=True)
class Failure:
    """A rank that failed.

    Attributes:
        exitcode: As in subprocess: the negative number of a signal that ended it.
        message: What it left to be said.
        place: Where it was last, in words.
    """

    rank: int
    host: str
    exitcode: int
    message: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Report:
    """How the ranks of a node ended.

    Attributes:
        failures: Those that failed.
        asked: The signals that its launcher was sent.
        cut_short: Whether not all of them came to their good end.
    """

    failures: tuple[Failure, ...] = ()
    asked: tuple[int, ...] = ()
    cut_short: bool = False


@dataclass(frozen=True)
class Verdict:
    """How a job ended: the exit code of all its launchers, and what the first says.

    Attributes:
        is_failure: Whether the sentence tells of a failure, and not of an end that was asked for.
    """

    code: int
    sentence: str = ""
    is_failure: bool = True


class Meeting:
    """The launchers of a job, as one of them knows them.

    Args:
        nodes: The place of this launcher.
        processes: Ranks that each node starts.
        timeout_minutes: How long to wait until all nodes have come.
        silence_minutes: A launcher that gives no word for so long is taken for lost.
        wait: Lets some seconds pass. May raise what ends this launcher.

    Attributes:
        over: Whether another node has failed, or is lost.
        speaks: Whether this launcher says how the job ended: that of node 0, and each that has lost it.

    Raises:
        UserError: Not all nodes came, or the endpoint cannot be used.
    """

    def __init__(
        self,
        nodes: Nodes,
        processes: int,
        *,
        timeout_minutes: float,
        silence_minutes: float,
        wait: Callable[[float], None],
    ) -> None:
        self.nodes = nodes
        self.over = False
        self.speaks = nodes.rank == 0
        self._silence = 60 * silence_minutes
        self._unanswered = 0.0  # seconds that this launcher has paused since the store answered last
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []  # those that use the store
        self._lost: dict[int, str] = {}  # node -> the sentence about it
        self._hosts: dict[int, str] = {}
        deadline = time.monotonic() + 60 * timeout_minutes
        server = _listen(nodes) if nodes.rank == 0 else _reach(nodes, deadline, timeout_minutes, wait)
        self.port = server.port
        self._store = dist.PrefixStore(f"launchers of {nodes.job}", server)
        if nodes.count > 1:
            try:
                self._come(processes, deadline, timeout_minutes, wait)
            except RuntimeError as error:
                raise UserError(
                    f"node 0 ended while nodes were coming to {nodes.endpoint}; its lines say why."
                ) from error
            self._begin(self._keep_in_touch)

    def _come(self, processes: int, deadline: float, minutes: float, wait: Callable[[float], None]) -> None:
        """Take this launcher's seat, and wait until every seat is taken."""
        nodes = self.nodes
        if self._store.add(f"seat {nodes.rank}", 1) > 1:
            raise UserError(
                f"--node-rank {nodes.rank} was given to two nodes that met at {nodes.endpoint}; each needs its own."
            )
        mine = {"host": socket.gethostname(), "nodes": nodes.count, "processes": processes}
        self._store.set(f"came {nodes.rank}", json.dumps(mine))
        while missing := [other for other in range(nodes.count) if not self._store.check([f"came {other}"])]:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{nodes.count - len(missing)} of {nodes.count} nodes came to {nodes.endpoint} within "
                    f"{minutes:g} minutes; missing: node {', '.join(map(str, missing))}. Was the program started "
                    "there, with the same --rdzv-endpoint and --rdzv-id?"
                )
            wait(0.2)
        for other in range(nodes.count):
            theirs = json.loads(self._store.get(f"came {other}"))
            self._hosts[other] = theirs.pop("host")
            if theirs != {name: mine[name] for name in theirs}:
                raise UserError(
                    f"nodes {nodes.rank} and {other} differ: --nnodes {nodes.count} --nproc-per-node {processes} here, "
                    f"--nnodes {theirs['nodes']} --nproc-per-node {theirs['processes']} there; give all nodes the same."
                )

    def _keep_in_touch(self) -> None:
        """Show that this launcher is there, and notice when another has failed or is gone. Runs beside the watch."""
        others = [other for other in range(self.nodes.count) if other != self.nodes.rank]
        heard = dict.fromkeys(others, (0, 0.0))  # node -> its last count, and seconds that it has stood still since
        while not self._left.wait(_SECONDS_BETWEEN_WORDS):
            try:
                self._store.add(f"beat {self.nodes.rank}", 1)
                self.over = self.over or self._store.check(["failed"])
                for other in others if self.nodes.rank == 0 else []:
                    count, still = heard[other]
                    now = self._store.add(f"beat {other}", 0)
                    # The pauses are counted, not the time: a launcher that was stopped itself must not blame others.
                    heard[other] = (now, 0.0 if now != count else still + _SECONDS_BETWEEN_WORDS)
                    if heard[other][1] > self._silence:
                        self._lose(other, f"has given no sign of life for {heard[other][1]:.0f} s")
                self._unanswered = 0.0
            except (RuntimeError, ValueError):  # torch's DistError is a RuntimeError
                self._lose(0, f"does not answer at {self.nodes.endpoint} any more")
                return

    def _lose(self, node: int, how: str) -> None:
        self._lost.setdefault(node, f"the launcher of node {node} ({self._hosts[node]}) {how}")
        self.over = True

    def pause(self, seconds: float) -> None:
        """Let time pass, and notice when node 0 does not answer any more.

        A question to a launcher that is stopped, or whose machine has vanished, never returns to the thread that asked
        it. Pauses are counted here, too: a launcher that was stopped itself must not blame another.
        """
        time.sleep(seconds)
        self._unanswered += seconds
        if self.nodes.rank > 0 and self._unanswered > self._silence:
            self._lose(0, f"has not answered at {self.nodes.endpoint} for {self._unanswered:.0f} s")

    def _begin(self, work: Callable[[], None]) -> None:
        """Do something with the store beside the main thread."""
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def leave(self) -> bool:
        """Keep in touch no longer.

        Returns:
            Whether nothing waits for the store any more. A thread that does while the program ends would abort it.
        """
        self._left.set()
        for thread in self._threads:
            thread.join(_SECONDS_BETWEEN_WORDS)
        return not any(thread.is_alive() for thread in self._threads)

    def agree(self, report: Report, judge: Callable[[Sequence[Report]], Verdict]) -> Verdict:
        """Tell all nodes how the ranks of this one ended, and learn how the job ended.

        Args:
            judge: Gives the verdict over the reports of all nodes. Node 0 calls it.
        """
        if self.nodes.count == 1:
            return judge([report])
        found = Future[Verdict]()

        def ask() -> None:
            try:
                found.set_result(self._agree(report, judge))
            except BaseException as error:
                found.set_exception(error)

        if 0 not in self._lost:
            self._begin(ask)
        while not found.done() and 0 not in self._lost:
            self.pause(SECONDS_BETWEEN_LOOKS)
        try:
            if found.done():
                return found.result()
        except (RuntimeError, ValueError):  # torch's DistError is a RuntimeError
            self._lose(0, f"does not answer at {self.nodes.endpoint} any more")
        self.speaks = True
        return Verdict(REQUEUE, f"{self._lost[0]}; all ranks of this node were stopped. {KEPT}")

    def _agree(self, report: Report, judge: Callable[[Sequence[Report]], Verdict]) -> Verdict:
        store, nodes = self._store, self.nodes
        store.set(f"report {nodes.rank}", json.dumps(asdict(report)))
        if report.cut_short:
            store.set("failed", "1")
        if nodes.rank > 0:
            verdict = Verdict(**json.loads(self._verdict()))
            store.set(f"read {nodes.rank}", "1")
            return verdict
        found = self._reports()
        verdict = judge(found)
        missing = [node for node in range(nodes.count) if not store.check([f"report {node}"])]
        if missing and verdict.code != USER_ERROR:
            said = self._lost.get(missing[0], f"the launcher of node {missing[0]} ({self._hosts[missing[0]]}) was lost")
            verdict = Verdict(REQUEUE, f"{said}; all ranks were stopped. {KEPT}")  # on other nodes it can go on
        store.set("verdict", json.dumps(asdict(verdict)))
        reading = [f"read {node}" for node in range(1, nodes.count) if node not in missing]
        self._until(lambda: not reading or store.check(reading), seconds=_SECONDS_FOR_REPORTS)
        return verdict

    def _reports(self) -> list[Report]:
        """The reports of all nodes; once one has failed, of those that come soon enough."""
        keys = [f"report {node}" for node in range(self.nodes.count)]
        while not self._store.check(keys):
            if self.over or self._store.check(["failed"]):
                self._store.set("failed", "1")
                self._until(lambda: self._store.check(keys), seconds=_SECONDS_FOR_REPORTS)
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        texts = [self._store.get(key) for key in keys if self._store.check([key])]
        return [_report_of(json.loads(text)) for text in texts]

    def _verdict(self) -> bytes:
        """Wait for the word of node 0. Other nodes may still be at work."""
        while not self._store.check(["verdict"]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return bytes(self._store.get("verdict"))

    @staticmethod
    def _until(done: Callable[[], bool], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _report_of(fields: dict[str, Any]) -> Report:
    failures = tuple(Failure(**failure) for failure in fields.pop("failures"))
    return Report(failures, tuple(fields["asked"]), fields["cut_short"])


def _listen(nodes: Nodes) -> dist.TCPStore:
    """Hold the store."""
    try:
        return dist.TCPStore(
            nodes.host,
            nodes.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=SECONDS_TO_ANSWER),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--rdzv-endpoint {nodes.endpoint}: node 0 cannot listen there ({in_short(error)}); it must be a name of "
            f"this host, {socket.gethostname()}, and a port that is free."
        ) from error


def _reach(nodes: Nodes, deadline: float, minutes: float, wait: Callable[[float], None]) -> dist.TCPStore:
    """Find the store of node 0, which may be started later than this node."""
    try:
        reach(nodes.host, nodes.port, deadline, wait)
    except UnknownNameError as error:
        raise UserError(
            f"--rdzv-endpoint {nodes.endpoint}: there is no machine of this name; give the address of node 0's."
        ) from error
    except OSError as error:
        raise UserError(
            f"node {nodes.rank} cannot reach node 0 at {nodes.endpoint} ({error.strerror or error}); it tried "
            f"for {minutes:g} minutes. Is node 0 started, and is this --rdzv-endpoint a name of its host?"
        ) from error
    try:
        return dist.TCPStore(
            nodes.host,
            nodes.port,
            is_master=False,
            timeout=timedelta(seconds=SECONDS_TO_ANSWER),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--rdzv-endpoint {nodes.endpoint}: what listens there is not the launcher of node 0 ({in_short(error)}); "
            "choose another port."
        ) from error
